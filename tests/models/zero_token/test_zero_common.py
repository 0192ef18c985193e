"""What transformers checks of every model in its own suite, which its wheel does not hold, in short."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from models.zero_token.support_zero import left_padded, looped, tokens
from modicum.models import ZeroTokenForCausalLM

FAMILIES = ["llama", "gpt2", "mistral", "qwen3"]
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(params=FAMILIES)
def model(request):
    return looped(request.param)


def logits(model, ids, **knobs):
    with torch.no_grad():
        return model(ids, use_cache=False, **knobs).logits


def greedy(model, ids, **knobs):
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0} | knobs
    return model.generate(ids, **settings)


def test_embeddings_in_place_of_ids_give_the_same(model):
    ids = tokens()
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(ids).logits)
    new = greedy(model, None, inputs_embeds=embeds)
    assert torch.equal(new, greedy(model, ids)[:, ids.shape[1] :])
    with pytest.raises(ValueError, match="exactly one"):
        model(ids, inputs_embeds=embeds)


def test_each_row_of_a_batch_is_as_it_would_be_alone(model):
    ids = tokens(3)
    together = logits(model, ids)
    for row in range(3):
        torch.testing.assert_close(together[row : row + 1], logits(model, ids[row : row + 1]), **CLOSE)


def test_right_padding_changes_nothing_before_it(model):
    ids = tokens()
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[:, 7:] = 0
    longer = torch.cat([ids, torch.zeros(2, 3, dtype=torch.long)], 1)
    torch.testing.assert_close(logits(model, longer, attention_mask=mask)[:, :7], logits(model, ids), **CLOSE)


def test_resized_embeddings_keep_the_old_rows_and_train(model):
    before = logits(model, tokens())
    model.resize_token_embeddings(50)
    assert model.config.vocab_size == model.vocab_size == 50
    assert model.get_output_embeddings().out_features == 50
    torch.testing.assert_close(logits(model, tokens())[..., :40], before, **CLOSE)
    ids = torch.full((1, 4), 45)
    model(ids, labels=ids).loss.backward()
    assert model.get_input_embeddings().weight.grad[45].abs().sum() > 0


def test_sampling_depends_on_the_generator_alone(model):
    drawn = []
    for use_cache in (True, True, False):
        torch.manual_seed(3)
        knobs = {"do_sample": True, "max_new_tokens": 5, "num_return_sequences": 2, "pad_token_id": 0}
        drawn.append(model.generate(tokens(), use_cache=use_cache, **knobs))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_drafted_tokens_that_are_rejected_leave_no_trace_in_the_cache(model):
    ids = tokens(1, 6).repeat(1, 3)
    plain = greedy(model, ids, max_new_tokens=10)
    assert torch.equal(greedy(model, ids, max_new_tokens=10, prompt_lookup_num_tokens=3), plain)


def test_generation_goes_on_from_a_cache(model):
    ids = tokens(1)
    whole = greedy(model, ids, max_new_tokens=6, eos_token_id=-1)
    first = greedy(model, ids, max_new_tokens=2, eos_token_id=-1, return_dict_in_generate=True)
    rest = greedy(model, first.sequences, max_new_tokens=4, eos_token_id=-1, cache=first.cache)
    assert torch.equal(rest, whole)


def test_generation_returns_what_it_is_asked_for(model):
    model.set_attn_implementation("eager")
    asked = {"output_scores": True, "output_attentions": True, "output_hidden_states": True}
    config = GenerationConfig(max_new_tokens=3, do_sample=False, pad_token_id=0, return_dict_in_generate=True, **asked)
    out = model.generate(tokens(), generation_config=config)
    steps, visits = len(out.scores), model.config.num_hidden_layers
    assert len(out.attentions) == len(out.hidden_states) == steps
    assert len(out.attentions[0]) == visits and len(out.hidden_states[0]) == visits + 1
    assert out.attentions[0][0].shape == (2, 4, 7, 7) and out.hidden_states[0][0].shape == (2, 7, 16)


def test_the_configuration_can_ask_for_attentions_and_states():
    model = looped()
    model.set_attn_implementation("eager")
    model.config.output_attentions = model.config.output_hidden_states = True
    out = model(tokens())
    assert len(out.attentions) == 8 and len(out.hidden_states) == 9
    some = model(tokens(), output_hidden_states=[0, -1], output_attentions=False)
    assert [x is not None for x in some.hidden_states] == [True] + 7 * [False] + [True]
    assert torch.equal(some.hidden_states[-1], out.hidden_states[-1]) and some.attentions is None


def test_gradients_reach_the_states_and_attentions():
    model = looped()
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True, output_hidden_states=True)
    for x in (out.hidden_states[3], out.attentions[3]):
        x.retain_grad()
    out.logits.sum().backward()
    assert out.hidden_states[3].grad.abs().sum() > 0 and out.attentions[3].grad.abs().sum() > 0


def test_tuple_and_object_hold_the_same(model):
    out, plain = model(tokens(), use_cache=False), model(tokens(), use_cache=False, return_dict=False)
    assert all(a is b or torch.equal(a, b) for a, b in zip(out.to_tuple(), plain) if isinstance(a, torch.Tensor))


def test_shards_come_back_whole(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), tokens()), logits(model, tokens()))


def test_settings_of_the_exit_can_be_given_when_loading(tmp_path):
    looped().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, exit_threshold=-1.0, exit_scope="token")
    assert model(tokens()).layer_calls == 4  # head, one cycle of two layers, tail


def test_a_copy_and_a_state_dict_are_independent(model):
    twin, fresh = copy.deepcopy(model), ZeroTokenForCausalLM(copy.deepcopy(model.config)).eval()
    fresh.load_state_dict(model.state_dict())
    before = logits(model, tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(twin, tokens()), before) and torch.equal(logits(fresh, tokens()), before)


def test_it_can_be_made_without_memory():
    with torch.device("meta"):
        model = ZeroTokenForCausalLM(looped().config)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_padded_beams_equal_beams_alone():
    model = looped()
    settings = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    padded = left_padded(tokens(1), 3)
    padded.pop("position_ids")
    assert torch.equal(model.generate(**padded, **settings)[:, 3:], model.generate(tokens(1), **settings))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_the_default_compiler_changes_nothing(host):
    model = looped(host, host_overrides={"n_layer" if host == "gpt2" else "num_hidden_layers": 3}, n_cycles=2)
    with torch.no_grad():
        compiled = torch.compile(model)(tokens(), use_cache=False).logits
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, logits(model, tokens()), **CLOSE)


def test_no_plan_of_the_hosts_splits_the_heads_among_devices(model):
    assert not model.tp_plan
