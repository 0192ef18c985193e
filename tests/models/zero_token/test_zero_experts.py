"""Hosts with experts, with layers of several kinds, and with attention of their own: what their layers are made of."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from models.zero_token.support_zero import _SIZES, decode, looped, tokens
from modicum.errors import UnsupportedError
from modicum.models import ZeroTokenForCausalLM, convert_to_zero_token
from modicum.models.zero_token import visit
from modicum.models.zero_token.hosts import linear_maps

_EXPERTS = {
    "head_dim": 4, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "n_shared_experts": 1, "n_group": 1,
    "topk_group": 1, "sliding_window": 5,
}  # fmt: skip


def untested(kind, **overrides):
    """Return a tiny model of a host that is not among the tested ones."""
    plain = AutoConfig.for_model(kind)
    sizes = {name: value for name, value in (_SIZES | _EXPERTS).items() if hasattr(plain, name)} | overrides
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


def converted(kind, **knobs):
    return convert_to_zero_token(untested(kind), **{"n_cycles": 2, "zero_key_init_std": 1.0} | knobs)


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen2_moe", "glm4_moe", "ernie4_5_moe", "olmoe", "cohere2_moe"])
def test_a_gate_closes_the_feed_forward_part_itself(kind):
    open_, gated = converted(kind), converted(kind, ffn_gate="zero_attention")
    gated.load_state_dict(open_.state_dict())
    seen = []
    for model in (open_, gated):
        part = model.layers[1].mlp
        part.register_forward_hook(lambda _, inputs, out: seen.append((inputs[0], out)))
    with torch.no_grad():
        open_(tokens(), n_cycles=1)
        p0 = gated(tokens(), n_cycles=1, output_zero_attention=True).zero_attention[1, 0].mean(1)
    (entered, plain), (entered_too, closed) = seen
    torch.testing.assert_close(entered, entered_too)
    torch.testing.assert_close(closed, plain * (1 - p0)[..., None].view(*plain.shape[:-1], 1))
    assert p0.min() > 0.01


@pytest.mark.parametrize("kind", ["qwen2_moe", "glm4_moe", "qwen3_moe", "phimoe", "llama4_text"])
def test_every_low_rank_term_has_a_gradient(kind):
    model = converted(kind, lora_rank=2).train()
    model(tokens(4, 12), labels=tokens(4, 12)).loss.backward()
    terms = {name: p.grad for name, p in model.zero_token.named_parameters() if name.endswith(":B")}
    assert len(terms) == sum(len(linear_maps(model.layers[layer])) for layer in model.config.middle)
    assert [name for name, gradient in terms.items() if gradient is None or not gradient.abs().sum() > 0] == []


@pytest.mark.parametrize("knobs", [{"ffn_gate": "zero_attention"}, {"lora_rank": 2}])
def test_no_visit_outlives_the_call_of_its_layer(knobs):
    model = looped("qwen3_moe", **knobs).train()
    model.gradient_checkpointing_enable()
    model(tokens(), labels=tokens()).loss.backward()
    assert visit._UNDER_WAY.get() is None
    model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens())
    assert visit._UNDER_WAY.get() is None


def test_a_pass_does_not_depend_on_the_one_before():
    model = converted("cohere2_moe", ffn_gate="zero_attention")
    with torch.no_grad():
        first = model(tokens()).logits
        model(tokens(seed=5))
        assert torch.equal(model(tokens()).logits, first)


@pytest.mark.parametrize("knobs", [{"zero_token": False}, {"mode": "tie", "zero_token": False}, {}])
def test_a_layer_that_attends_twice_is_refused(knobs):
    with pytest.raises(UnsupportedError, match="2 times"):
        convert_to_zero_token(untested("diffllama"), n_head=0, n_cycles=2, **knobs)


@pytest.mark.parametrize("mode", ["loop", "tie"])
def test_a_host_with_sinks_is_refused_when_it_is_converted(mode):
    with pytest.raises(UnsupportedError, match="zero_token to false"):
        convert_to_zero_token(untested("gpt_oss"), n_head=0, n_cycles=2, mode=mode)


def test_a_gate_is_refused_where_the_feed_forward_part_is_no_module():
    with pytest.raises(UnsupportedError, match="Leave ffn_gate out"):
        looped("opt", ffn_gate="zero_attention")


@pytest.mark.parametrize("kind", ["exaone_moe", "cohere2_moe", "mellum"])
def test_hosts_with_feed_forward_parts_of_several_kinds_are_saved(kind, tmp_path):
    model = converted(kind)
    kinds = model.config.host.mlp_layer_types
    assert model.config.mlp_layer_types == [kinds[layer] for layer, _ in model.schedule]
    model.save_pretrained(tmp_path)
    again = ZeroTokenForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.host.mlp_layer_types == kinds
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()).logits, model(tokens()).logits, atol=1e-4, rtol=0)


def test_layers_that_know_their_visit_are_copied_pickled_and_compiled():
    model = looped("llama", lora_rank=2, ffn_gate="zero_attention", n_cycles=2)
    with torch.no_grad():
        want = model(tokens(), use_cache=False).logits
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(tokens(), use_cache=False).logits, want)
        got = torch.compile(model, backend="eager", fullgraph=True)(input_ids=tokens(), use_cache=False).logits
        torch.testing.assert_close(got, want)
        torch._dynamo.reset()
        assert torch.equal(model(tokens(), use_cache=False).logits, want)


@pytest.mark.parametrize("knobs", [{"route": "concat"}, {}])
def test_hosts_that_take_a_view_of_what_attention_returns(knobs):
    model = converted("afmoe", **knobs)
    want = model(tokens(), use_cache=False).logits
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(tokens(), use_cache=False).logits, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "knobs",
    [
        {"cycle_embedding": "add"},
        {"cycle_embedding": "multiply", "cycle_gate": "rezero"},
        {"lora_rank": 2, "ffn_gate": "zero_attention"},
    ],
)
def test_a_pool_of_more_bits_than_the_weights_trains_and_decodes(knobs):
    model = looped(**knobs).bfloat16()
    model.zero_token.float()
    out = model(tokens(), labels=tokens())
    out.loss.backward()
    assert out.logits.dtype is torch.bfloat16
    assert all(p.grad.isfinite().all() and p.grad.dtype is torch.float32 for p in model.zero_token.parameters())
    assert decode(model, tokens())[0].isfinite().all()
