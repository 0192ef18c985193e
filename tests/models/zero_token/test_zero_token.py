import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from models.zero_token.support_zero import HOSTS, base_model, decode, left_padded, looped, tokens
from modicum.errors import CheckpointError, UnsupportedError
from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM, ZeroTokenModel
from oracles import zero_token as oracle

CONFIGURATIONS = {
    "zero tokens": {},
    "no zero token": {"zero_token": False},
    "basic cycling": {"n_head": 0, "n_tail": 0},
    "sequence": {"order": "sequence"},
    "cycle_rev": {"order": "cycle_rev"},
    "explicit": {"order": [0, 1, 2, 1, 2, 2, 3]},
    "all layers": {"zero_layers": "all"},
    "key per cycle": {"pool": "cycle"},
    "key per layer": {"pool": "layer"},
    "relative": {"zero_key_rope": "relative"},
    "bias": {"zero_bias": True},
    "off by one": {"zero_kind": "off_by_one"},
    "sink": {"zero_kind": "sink"},
    "added embedding": {"cycle_embedding": "add"},
    "recursion encoding": {"cycle_embedding": "multiply"},
    "rezero": {"cycle_gate": "rezero"},
    "anchor": {"loop_connection": "anchor"},
    "residual": {"loop_connection": "residual"},
    "gated feed-forward": {"ffn_gate": "zero_attention"},
    "relaxed": {"lora_rank": 2},
    "share_first": {"cache_policy": "share_first"},
    "propagate": {"cache_policy": "propagate"},
    "select": {"cache_policy": "select"},
    "one layer": {"n_head": 0, "n_tail": 0, "host_overrides": {"num_hidden_layers": 1}},
}


def full(model, input_ids, **knobs):
    with torch.no_grad():
        return model(input_ids, use_cache=False, **knobs).logits


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_one_cycle_without_zero_token_is_the_host_bit_for_bit(host, backend):
    base = base_model(host)
    base.set_attn_implementation(backend)
    model = looped(host, n_cycles=1, zero_token=False)
    model.set_attn_implementation(backend)
    assert set(model.state_dict()) == set(base.state_dict())
    model.load_state_dict(base.state_dict())
    assert torch.equal(full(model, tokens()), full(base, tokens()))
    padded = left_padded(tokens(), 3)
    assert torch.equal(model(**padded).logits[:, 3:], base(**padded).logits[:, 3:])


@pytest.mark.parametrize("host", HOSTS)
def test_cached_decoding_equals_one_full_pass_for_every_host(host):
    model = looped(host)
    logits, _, cache = decode(model, tokens())
    torch.testing.assert_close(logits, full(model, tokens()), atol=1e-4, rtol=0)
    assert len(cache) == 2 + 3 * 2
    assert cache.get_seq_length() == 7


@pytest.mark.parametrize("name", CONFIGURATIONS)
@pytest.mark.parametrize("prefill", [0, 3])
def test_cached_decoding_equals_one_full_pass_for_every_configuration(name, prefill):
    model = looped(**CONFIGURATIONS[name])
    logits, _, _ = decode(model, tokens(), prefill=prefill)
    torch.testing.assert_close(logits, full(model, tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cycles", [1, 2, 3])
def test_cached_decoding_equals_one_full_pass_at_fewer_cycles(cycles):
    model = looped()
    logits, ran, _ = decode(model, tokens(), n_cycles=cycles)
    torch.testing.assert_close(logits, full(model, tokens(), n_cycles=cycles), atol=1e-4, rtol=0)
    assert (ran == cycles).all()


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_left_padding_changes_nothing_at_real_positions(host, backend):
    model = looped(host)
    model.set_attn_implementation(backend)
    with torch.no_grad():
        out = model(**left_padded(tokens(), 3))
    assert out.logits.isfinite().all()
    torch.testing.assert_close(out.logits[:, 3:], full(model, tokens()), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_eager_and_sdpa_agree(name):
    model = looped(**CONFIGURATIONS[name])
    sdpa = full(model, tokens())
    model.set_attn_implementation("eager")
    torch.testing.assert_close(full(model, tokens()), sdpa, atol=1e-4, rtol=0)
    logits, _, _ = decode(model, tokens())
    torch.testing.assert_close(logits, sdpa, atol=1e-4, rtol=0)


@pytest.mark.parametrize("route", ["concat", "lse", "eager"])
def test_routes_agree_in_the_model_with_padding_and_window(route):
    reference = looped("mistral", route="auto")
    model = looped("mistral", route=route)
    padded = left_padded(tokens(), 3)
    torch.testing.assert_close(model(**padded).logits[:, 3:], reference(**padded).logits[:, 3:], atol=1e-4, rtol=0)


@pytest.mark.oracle("models", "zero_token")
def test_the_model_equals_the_oracle():
    model = looped().double()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    sequence = tokens(1)[0].tolist()
    slow = oracle.Llama(
        weights, n_layers=4, heads=4, groups=2, eps=config.rms_norm_eps, theta=config.rope_parameters["rope_theta"],
        n_cycles=3,
    )  # fmt: skip
    expected = np.stack([slow.step(token, i)[0] for i, token in enumerate(sequence)])
    np.testing.assert_allclose(full(model, torch.tensor([sequence]))[0].numpy(), expected, atol=1e-5)


def test_a_later_token_changes_nothing_before_it():
    model = looped()
    changed = tokens().clone()
    changed[:, 4] = (changed[:, 4] + 1) % 30 + 3
    a, b = full(model, tokens()), full(model, changed)
    assert torch.equal(a[:, :4], b[:, :4])
    assert not torch.allclose(a[:, 4:], b[:, 4:])


def test_relative_zero_key_does_not_care_where_the_text_starts():
    ids, positions = tokens(), torch.arange(7)[None]
    for rope, moves in (("relative", False), ("none", True)):
        model = looped(zero_key_rope=rope)
        difference = (
            (full(model, ids, position_ids=positions) - full(model, ids, position_ids=positions + 5)).abs().max()
        )
        assert bool(difference > 1e-3) is moves


def test_relative_zero_keys_need_rotary_positions():
    with pytest.raises(UnsupportedError):
        looped("gpt2", zero_key_rope="relative")


def test_parameters_grow_by_one_key_for_each_new_visit():
    def count(**knobs):
        return sum(p.numel() for p in looped(**knobs).parameters())

    assert count(n_cycles=4) - count(n_cycles=1) == 3 * 2 * 2 * 4
    assert count(n_cycles=4, zero_token=False) == count(n_cycles=1, zero_token=False)


def test_every_zero_key_has_a_gradient_and_shared_weights_collect_all_cycles():
    model = looped(n_cycles=2).double()
    untied = looped(order=[0, 1, 2, 3, 4, 5], host_overrides={"num_hidden_layers": 6}, zero_layers="all").double()
    order = [0, 1, 2, 1, 2, 3]
    state = {n: t for n, t in model.state_dict().items() if ".layers." not in n and "zero" not in n}
    for copy_layer, layer in enumerate(order):
        for name, tensor in model.layers[layer].state_dict().items():
            state[f"model.layers.{copy_layer}.{name}"] = tensor
    untied.load_state_dict(state | {"zero_token.zero_key": torch.zeros(6, 2, 4)})
    untied._rows = {(i, 0): i - 1 for i in range(1, 5)}
    with torch.no_grad():
        untied.zero_token.zero_key[:4] = model.zero_token.zero_key
    for m in (model, untied):
        m(tokens(), labels=tokens()).loss.backward()
    assert (model.zero_token.zero_key.grad.abs().amax((1, 2)) > 0).all()
    for name, parameter in model.layers[1].named_parameters():
        copies = [dict(untied.layers[i].named_parameters())[name].grad for i in (1, 3)]
        torch.testing.assert_close(parameter.grad, sum(copies), atol=1e-12, rtol=1e-9)


def test_zero_keys_tell_the_cycles_apart():
    model = looped(n_cycles=2)
    before = full(model, tokens())
    swapped, same = copy.deepcopy(model), copy.deepcopy(model)
    per_layer = looped(n_cycles=2, pool="layer")
    per_layer.load_state_dict({n: t for n, t in model.state_dict().items() if "zero" not in n}, strict=False)
    with torch.no_grad():
        swapped.zero_token.zero_key.copy_(model.zero_token.zero_key[[2, 3, 0, 1]])
        same.zero_token.zero_key[2:] = same.zero_token.zero_key[:2]
        per_layer.zero_token.zero_key.copy_(model.zero_token.zero_key[:2])
    assert not torch.allclose(full(swapped, tokens()), before, atol=1e-3)
    torch.testing.assert_close(full(same, tokens()), full(per_layer, tokens()), atol=1e-6, rtol=0)


def test_value_biases_do_not_leak_through_the_zero_token():
    model = looped("llama-tied-bias", zero_bias=True)
    plain = looped("llama-tied-bias", zero_token=False, n_cycles=1)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "zero" not in n}, strict=False)
    for layer in plain.layers[1:3]:
        torch.nn.init.zeros_(layer.self_attn.v_proj.weight)
        torch.nn.init.zeros_(layer.self_attn.v_proj.bias)
    with torch.no_grad():
        model.zero_token.zero_bias.fill_(torch.inf)
    torch.testing.assert_close(full(model, tokens(), n_cycles=1), full(plain, tokens()), atol=1e-5, rtol=0)


def test_key_norm_applies_to_the_zero_key():
    small, large = looped("qwen3"), looped("qwen3")
    with torch.no_grad():
        large.zero_token.zero_key.mul_(50)
    torch.testing.assert_close(full(large, tokens()), full(small, tokens()), atol=1e-4, rtol=0)
    free = looped("qwen3", zero_key_norm=False)
    assert not torch.allclose(full(free, tokens()), full(small, tokens()), atol=1e-3)


def test_zero_attention_is_reported_for_each_visit():
    out = looped()(tokens(), output_zero_attention=True)
    assert set(out.zero_attention) == {(layer, cycle) for layer in (1, 2) for cycle in range(3)}
    assert all(p.shape == (2, 4, 7) and (p > 0).all() and (p < 1).all() for p in out.zero_attention.values())


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_eager_attention_weights_and_the_zero_token_share_one(host):
    model = looped(host)
    model.set_attn_implementation("eager")
    out = model(tokens(), output_attentions=True, output_zero_attention=True, output_hidden_states=True)
    assert len(out.attentions) == 8
    assert len(out.hidden_states) == 9
    p0 = list(out.zero_attention.values())
    for weights, p in zip(out.attentions[1:7], p0):
        torch.testing.assert_close(weights.sum(-1) + p, torch.ones(2, 4, 7))
    torch.testing.assert_close(model.lm_head(out.hidden_states[-1]), out.logits)


@pytest.mark.parametrize("host", HOSTS)
def test_generation_is_the_same_with_and_without_cache(host):
    model = looped(host)
    knobs = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    padded = left_padded(tokens(), 2)
    padded.pop("position_ids")
    a = model.generate(**padded, **knobs)
    assert torch.equal(a, model.generate(**padded, use_cache=False, **knobs))
    assert torch.equal(a[:1, 2:], model.generate(tokens()[:1], **knobs)[:, : a.shape[1] - 2])


@pytest.mark.parametrize("knobs", [{}, {"exit_threshold": 0.2, "exit_scope": "prefix"}])
def test_beams_reorder_every_slot(knobs):
    model = looped(**knobs)
    settings = {"max_new_tokens": 6, "num_beams": 3, "pad_token_id": 0, "do_sample": False}
    assert torch.equal(model.generate(tokens(), **settings), model.generate(tokens(), use_cache=False, **settings))


def test_a_cropped_cache_continues_as_if_the_tokens_had_not_been():
    model = looped()
    _, _, cache = decode(model, tokens())
    cache.crop(-3)
    with torch.no_grad():
        out = model(tokens()[:, 4:], cache=cache)
    torch.testing.assert_close(out.logits, full(model, tokens())[:, 4:], atol=1e-4, rtol=0)


def test_a_selected_or_repeated_batch_keeps_its_slots():
    model = looped()
    _, _, cache = decode(model, tokens())
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    ids = tokens()[1:].repeat(2, 1)
    with torch.no_grad():
        out = model(torch.full((2, 1), 5), cache=cache)
    torch.testing.assert_close(out.logits[:, 0], full(model, torch.cat([ids, torch.full((2, 1), 5)], 1))[:, -1])


def test_the_cache_grows_past_its_first_allocation():
    model = looped(host_overrides={"max_position_embeddings": 256})
    ids = tokens(1, 70)
    logits, _, cache = decode(model, ids, prefill=62)  # room for three more, then the buffers grow
    torch.testing.assert_close(logits, full(model, ids), atol=5e-5, rtol=0)
    assert cache.get_seq_length() == 70
    cache.reset()
    assert cache.get_seq_length() == 0


def test_the_cache_takes_hardly_more_memory_than_its_tokens():
    model = looped(host_overrides={"max_position_embeddings": 512})
    for prefill in (1, 60, 200):
        cache = decode(model, tokens(1, 260), prefill=prefill)[2]
        for layer in cache.layers:
            assert layer._buffers[0].shape[2] <= 1.1 * 260


def test_training_with_a_cache_has_the_same_gradients():
    model = looped()
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        model(tokens(), labels=tokens(), use_cache=use_cache).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["zero tokens", "relaxed", "gated feed-forward", "share_first"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(name, reentrant):
    if reentrant and name == "share_first":
        pytest.skip("refused, see below")
    model = looped(**CONFIGURATIONS[name]).train()
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_reentrant_checkpointing_is_refused_where_it_would_lose_gradients():
    model = looped(cache_policy="share_first").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(UnsupportedError, match="use_reentrant"):
        model(tokens())


@pytest.mark.parametrize("host", HOSTS)
def test_a_saved_model_comes_back_through_the_auto_class(host, tmp_path):
    model = looped(host, exit_threshold=0.5)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, ZeroTokenForCausalLM)
    assert again.config.schedule == model.config.schedule
    assert again.config.exit_threshold == 0.5
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_the_file_holds_each_physical_weight_once(tmp_path):
    from safetensors import safe_open

    model = looped("llama-tied-bias")
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    base = set(base_model("llama-tied-bias").state_dict()) - {"lm_head.weight"}
    assert names == base | {"zero_token.zero_key"}


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_a_base_checkpoint_loads_with_only_the_pool_missing(host, tmp_path):
    base = base_model(host)
    base.save_pretrained(tmp_path)
    config = ZeroTokenConfig(host=base.config, n_cycles=2, n_head=1)
    model, report = ZeroTokenForCausalLM.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert set(report["missing_keys"]) == {"zero_token.zero_key"}
    assert not report["unexpected_keys"]
    assert torch.equal(model.zero_token.zero_key, looped(host, n_cycles=2, zero_key_init_std=0.02).zero_token.zero_key)


@pytest.mark.parametrize("host", ["gpt_neox", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("kind", [ZeroTokenForCausalLM, ZeroTokenModel])
def test_a_base_checkpoint_with_names_of_its_own_is_refused(host, kind, tmp_path):
    base = base_model(host)
    base.save_pretrained(tmp_path)
    if host == "gpt_neox" and kind is ZeroTokenModel:  # only the head has another name
        assert kind.from_pretrained(tmp_path, config=ZeroTokenConfig(host=base.config)) is not None
        return
    with pytest.raises(CheckpointError, match="convert_to_zero_token"):
        kind.from_pretrained(tmp_path, config=ZeroTokenConfig(host=base.config))


def test_a_checkpoint_with_other_cycles_names_the_way_out(tmp_path):
    looped(n_cycles=2).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="resize_pool"):
        ZeroTokenForCausalLM.from_pretrained(tmp_path, n_cycles=3)
    with pytest.raises(CheckpointError, match="resize_pool"):
        looped(n_cycles=3).load_state_dict(looped(n_cycles=2).state_dict())
