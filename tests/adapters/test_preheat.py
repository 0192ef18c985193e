"""Preheating on a real PEFT model: what it learns, and that nothing else is touched."""

import hashlib

import pytest
import torch
from peft import IA3Config, KasaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modicum.adapters import Preheat, get_hrp_state_dict, initialize_lora_hrp_weights, preheating
from modicum.adapters.layers import factors_of, lora_layers, whole
from modicum.adapters.preheat import hrp_state
from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.random import generator
from support import tiny_llama

LR = 1e-3
SHORT = Preheat(preheat_rank=12, preheat_steps=4)


def wrapped(**config):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    return get_peft_model(tiny_llama(), LoraConfig(**settings))


def batches(count=4, seed=0):
    rng = generator(seed, "batches")
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 264, (count, 2, 12), generator=rng)]


def digest(tensors):
    sha = hashlib.sha256()
    for name, tensor in tensors:
        sha.update(name.encode() + tensor.detach().numpy().tobytes())
    return sha.hexdigest()


def fingerprint(model):
    return {
        "tensors": digest(model.named_parameters()),
        "buffers": digest(model.named_buffers()),
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": [id(p) for p in model.parameters()],
        "grads": [name for name, p in model.named_parameters() if p.grad is not None],
        "modes": [module.training for module in model.modules()],
        "adapters": sorted(model.peft_config),
        "active": model.active_adapter,
        "rng": torch.get_rng_state().tolist(),
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
    }


@pytest.mark.parametrize("train_factors", ["both", "A", "B"])
@pytest.mark.parametrize("training", [True, False])
def test_preheating_leaves_no_trace(train_factors, training):
    model = wrapped(lora_dropout=0.1).train(training)
    before = fingerprint(model)
    state = get_hrp_state_dict(
        model, batches(), lr=LR, config=Preheat(preheat_rank=12, preheat_steps=4, train_factors=train_factors)
    )
    assert fingerprint(model) == before
    assert {name.rpartition(".")[2] for name in state} == {"U", "S", "V"} and len(state) == 3 * 14


def test_an_error_inside_the_stage_leaves_no_trace_either():
    model = wrapped()
    before = fingerprint(model)
    with pytest.raises(RuntimeError, match="stop"), preheating(model, config=SHORT):
        raise RuntimeError("stop")
    assert fingerprint(model) == before


@pytest.mark.parametrize(("init_factor", "zero"), [("A", "lora_B"), ("B", "lora_A")])
def test_after_the_start_the_model_gives_the_same_bits_as_its_base(init_factor, zero):
    base = tiny_llama().eval()
    model = wrapped().eval()
    ids = batches()[0]["input_ids"]
    expected = base(ids).logits
    parameters = [id(p) for p in model.parameters()]
    state = get_hrp_state_dict(model, batches(), lr=LR, config=SHORT)
    assert initialize_lora_hrp_weights(model, state, init_factor=init_factor) == []
    assert torch.equal(model(ids).logits, expected)
    assert [id(p) for p in model.parameters()] == parameters
    for layer in lora_layers(model).values():
        A, B = (factor.detach() for factor in factors_of(layer, "default"))
        assert not (B if zero == "lora_B" else A).any()
        vectors = A if init_factor == "A" else B.T
        torch.testing.assert_close(vectors @ vectors.T, torch.eye(4) / 3, atol=1e-5, rtol=0)


def test_the_start_is_the_leading_part_of_what_the_stage_trained():
    model = wrapped()
    with preheating(model, config=SHORT) as stage:
        for parameter in stage.parameters():
            torch.nn.init.normal_(parameter, generator=generator(0, "by hand", parameter.shape[0]))
        learned = {
            name: layer.scaling["_hrp"] * (factors_of(layer, "_hrp")[1] @ factors_of(layer, "_hrp")[0]).detach()
            for name, layer in stage.layers.items()
        }
        state = stage.state()
    initialize_lora_hrp_weights(model, state, init_factor="balanced")
    for name, layer in lora_layers(model).items():
        A, B = factors_of(layer, "default")
        U, S, Vh = torch.linalg.svd(learned[name])
        best = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(layer.scaling["default"] * (B @ A).detach(), best, atol=1e-3, rtol=1e-3)


def test_the_stage_trains_what_it_says_and_starts_from_a_zero_product():
    for train_factors, trained in (("both", {"lora_A", "lora_B"}), ("A", {"lora_A"}), ("B", {"lora_B"})):
        model = wrapped()
        with preheating(model, config=Preheat(preheat_rank=12, train_factors=train_factors)) as stage:
            flags = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
            assert flags == trained
            for layer in stage.layers.values():
                A, B = factors_of(layer, "_hrp")
                assert not (B @ A).any() and (A.any() or B.any())


def test_scaling_is_kept_unless_told_otherwise_and_short_sides_clip_the_rank():
    model = wrapped(use_rslora=True)
    with preheating(model, config=Preheat(preheat_rank=24)) as stage:
        assert {layer.scaling["_hrp"] for layer in stage.layers.values()} == {8 / 4**0.5}
        assert {layer.r["_hrp"] for layer in stage.layers.values()} == {24, 16}  # k and v have 16 outputs
    with preheating(model, config=Preheat(preheat_rank=16, keep_scaling=False)) as stage:
        assert {layer.scaling["_hrp"] for layer in stage.layers.values()} == {8 / 16**0.5}


def test_a_name_with_dots_clips_no_other_module():
    parts = torch.nn.ModuleDict({"b": torch.nn.Linear(20, 3)})
    net = torch.nn.ModuleDict({"a": parts, "a_b": torch.nn.Linear(20, 20)})
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["b", "a_b"]))
    with preheating(model, config=Preheat(preheat_rank=12)) as stage:
        assert {name: layer.r["_hrp"] for name, layer in stage.layers.items()} == {"a.b": 3, "a_b": 12}


def test_equal_seeds_give_equal_bits_whatever_the_global_generator_says():
    states = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        states.append(get_hrp_state_dict(wrapped(), batches(), lr=LR, config=SHORT, seed=seed))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_a_saved_state_serves_any_rank_up_to_its_own(tmp_path):
    state = get_hrp_state_dict(wrapped(), batches(), lr=LR, rank=2, config=SHORT)
    save_file(state, tmp_path / "hrp.safetensors")
    loaded = load_file(tmp_path / "hrp.safetensors")
    rows = {}
    for rank in (2, 6):
        model = wrapped(r=rank)
        initialize_lora_hrp_weights(model, loaded)
        rows[rank] = next(iter(lora_layers(model).values())).lora_A["default"].weight.detach()
    torch.testing.assert_close(rows[2], rows[6][:2])
    with pytest.raises(ModicumError, match="rank is 13, but the state holds 12 directions"):
        initialize_lora_hrp_weights(wrapped(r=13), loaded)


@pytest.mark.parametrize("threads", [1, 3])
def test_directions_beyond_those_to_keep_are_not_computed_and_the_kept_are_the_same(threads):
    rng = generator(0, "learned")
    learned = {str(i): (torch.randn(8, 20 + i, generator=rng), torch.randn(16, 8, generator=rng)) for i in range(5)}
    whole_state = hrp_state(learned)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        kept = hrp_state(learned, keep=3)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert list(kept) == list(whole_state)
    for key, value in kept.items():
        torch.testing.assert_close(value, whole_state[key] if key.endswith("S") else whole_state[key][:, :3])
        assert not value.requires_grad


def test_the_saved_adapter_is_plain_lora_to_stock_peft(tmp_path):
    model = wrapped().eval()
    initialize_lora_hrp_weights(
        model, get_hrp_state_dict(model, batches(), lr=LR, config=SHORT), init_factor="balanced"
    )
    ids = batches()[0]["input_ids"]
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    assert (config.init_lora_weights, config.r, config.lora_alpha) == (True, 4, 8)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_follow_the_spectrum_at_an_unchanged_sum_and_load_in_stock_peft(rslora, tmp_path):
    model = wrapped(use_rslora=rslora)
    state = get_hrp_state_dict(model, batches(), lr=LR, config=SHORT)
    scaling = {layer.scaling["default"] for layer in lora_layers(model).values()}
    initialize_lora_hrp_weights(model, state, rank_redistribution="eva")
    layers = lora_layers(model)
    assert sum(layer.r["default"] for layer in layers.values()) == 4 * len(layers)
    assert len({layer.r["default"] for layer in layers.values()}) > 1
    assert {layer.scaling["default"] for layer in layers.values()} == scaling
    model.save_pretrained(tmp_path)
    loaded = lora_layers(PeftModel.from_pretrained(tiny_llama(), tmp_path))
    for name, layer in layers.items():
        assert loaded[name].scaling["default"] == layer.scaling["default"]
        assert torch.equal(loaded[name].lora_A["default"].weight, layer.lora_A["default"].weight)


def test_a_module_that_learned_nothing_keeps_its_default_start_and_is_named():
    model = wrapped()
    state = get_hrp_state_dict(model, batches(), lr=LR, config=SHORT)
    name = "model.layers.1.mlp.up_proj"
    state[f"{name}.S"].zero_()
    before = lora_layers(model)[name].lora_A["default"].weight.detach().clone()
    with pytest.warns(UserWarning, match=f"1 modules at their default start: {name}"):
        assert initialize_lora_hrp_weights(model, state) == [name]
    assert torch.equal(lora_layers(model)[name].lora_A["default"].weight, before)


def test_embeddings_keep_their_default_start_and_are_named():
    untied = tiny_llama(tie_word_embeddings=False)
    model = get_peft_model(untied, LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    state = get_hrp_state_dict(model, batches(), lr=LR, config=SHORT)
    with pytest.warns(UserWarning, match="1 modules at their default start: model.embed_tokens"):
        assert initialize_lora_hrp_weights(model, state) == ["model.embed_tokens"]
    assert len(state) == 3 * 2


def test_convolutions_keep_their_default_start_and_are_named():
    net = torch.nn.Sequential(torch.nn.Conv1d(3, 5, 2), torch.nn.Flatten(), torch.nn.Linear(20, 6))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "2"]))
    data = [{"input": torch.randn(4, 3, 5, generator=generator(0, "images"))}] * 2
    config = Preheat(preheat_rank=4, preheat_steps=2)
    state = get_hrp_state_dict(model, data, lr=LR, config=config, loss=lambda m, b: m(**b).square().sum())
    assert {key.rpartition(".")[0] for key in state} == {"2"}
    with pytest.warns(UserWarning, match="1 modules at their default start: 0"):
        assert initialize_lora_hrp_weights(model, state) == ["0"]


def test_one_sgd_step_of_b_is_the_gradient_seen_through_a():
    """A linear model with whitened inputs: B = -lr s G A^T exactly, where G is the gradient of the weight."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False))
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=6, target_modules=["0"]))
    inputs = torch.linalg.qr(torch.randn(20, 6, generator=generator(0, "inputs"))).Q
    targets = torch.randn(20, 5, generator=generator(0, "targets"))
    G = (inputs @ net[0].base_layer.weight.T - targets).T @ inputs
    with preheating(model, config=Preheat(preheat_rank=4, train_factors="B")) as stage:
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        ((model(inputs) - targets).square().sum() / 2).backward()
        optimizer.step()
        A, B = (factor.detach() for factor in factors_of(stage.layers["0"], "_hrp"))
        torch.testing.assert_close(B, -0.1 * 3.0 * G @ A.T)
        state = stage.state()
    left = torch.linalg.qr(G @ A.T).Q
    torch.testing.assert_close(left @ left.T, state["0.U"] @ state["0.U"].T, atol=1e-5, rtol=0)


def test_preheating_draws_dropout_as_training_does():
    seen = []
    model = wrapped(lora_dropout=0.5).eval()
    get_hrp_state_dict(model, batches(), lr=LR, config=SHORT, loss=lambda m, b: seen.append(m.training) or m(**b).loss)
    assert seen == [True] * 4 and not model.training


def test_the_random_start_is_named_by_its_module_and_as_wide_as_the_usual_one():
    model = wrapped()
    with preheating(model, config=Preheat(preheat_rank=12)) as stage:
        starts = {name: factors_of(layer, "_hrp")[0].detach() for name, layer in stage.layers.items()}
    for name, A in starts.items():
        bound = A.shape[1] ** -0.5
        assert 0.9 * bound < float(A.max()) <= bound and -bound <= float(A.min()) < -0.9 * bound
        twin = name.replace("layers.0", "layers.1")
        assert twin == name or not torch.equal(A, starts[twin])


def test_directions_that_complete_a_module_are_named_by_it():
    model = wrapped()
    state = get_hrp_state_dict(model, batches(), lr=LR, config=SHORT)
    q, o = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"
    for key in "USV":
        state[f"{o}.{key}"] = state[f"{q}.{key}"].clone()
    for name in (q, o):
        state[f"{name}.S"][1:] = 0
    layers = lora_layers(model)
    rows = []
    for seed in (0, 0, 1):
        initialize_lora_hrp_weights(model, state, seed=seed)
        rows.append([layers[name].lora_A["default"].weight.detach().clone() for name in (q, o)])
    assert torch.equal(rows[0][0][0], rows[0][1][0]) and not torch.allclose(rows[0][0][1], rows[0][1][1])
    assert torch.equal(rows[0][0], rows[1][0]) and not torch.allclose(rows[0][0][1], rows[2][0][1])


def test_the_main_adapters_extras_do_not_enter_the_stage():
    base = tiny_llama(tie_word_embeddings=False, attention_bias=True)
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], bias="lora_only")
    model = get_peft_model(base, config)
    with preheating(model, config=SHORT):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("_hrp" in name and ".lora_" in name for name in trained)


def test_a_bfloat16_base_stays_bfloat16_and_untouched():
    model = get_peft_model(tiny_llama().bfloat16(), LoraConfig(r=4, target_modules="all-linear"))
    before = {n: p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    initialize_lora_hrp_weights(model, get_hrp_state_dict(model, batches(), lr=LR, config=SHORT))
    after = dict(model.named_parameters())
    assert all(torch.equal(after[n], p) and p.dtype == torch.bfloat16 for n, p in before.items())


def fails(message, *, config=SHORT, data=None, error=ModicumError, **lora):
    with pytest.raises(error, match=message):
        get_hrp_state_dict(wrapped(**lora), batches() if data is None else data, lr=LR, config=config)


def test_what_cannot_be_preheated_is_said():
    fails("preheat_rank is 2, expected at least the adapter's rank 4", config=Preheat(preheat_rank=2))
    for knob in ({"preheat_steps": 0}, {"preheat_rank": 0}, {"preheat_rank": -1}):
        with pytest.raises(RecipeError, match=f"{next(iter(knob))} is .*, expected a whole number above 0 or None"):
            Preheat(**knob)
    fails("data end after 0 of 4 preheating steps", data=[])
    fails("data end after 2 of 4 preheating steps", data=batches(2))
    fails("no loss: the batch holds no labels", data=[{"input_ids": b["input_ids"]} for b in batches()])
    fails("use_dora adapters cannot be started", error=UnsupportedError, use_dora=True)
    fails(
        "Variant adapters cannot be started", error=UnsupportedError, task_type="CAUSAL_LM", alora_invocation_tokens=[5]
    )
    biased = get_peft_model(tiny_llama(attention_bias=True), LoraConfig(target_modules=["q_proj"], lora_bias=True))
    with pytest.raises(UnsupportedError, match="lora_bias adapters cannot be started"):
        get_hrp_state_dict(biased, batches(), lr=LR, config=SHORT)


def test_a_diverging_stage_says_so():
    with pytest.raises(ModicumError, match="loss became NaN or infinite"):
        get_hrp_state_dict(wrapped(), batches(), lr=LR, config=SHORT, loss=lambda m, b: m(**b).loss * float("nan"))


def test_adapters_of_other_kinds_are_refused():
    foreign = get_peft_model(tiny_llama(), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ModicumError, match="no linear LoRA layer of an adapter 'default'"):
        get_hrp_state_dict(foreign, batches(), lr=LR, config=SHORT)
    fails("Variant adapters cannot be started", error=UnsupportedError, kasa_config=KasaConfig())


def test_other_models_are_refused():
    with pytest.raises(ModicumError, match="no linear LoRA layer of an adapter 'default'"):
        lora_layers(tiny_llama())
    merged = wrapped()
    merged.merge_adapter()
    with pytest.raises(UnsupportedError, match=r"merged into the base.*unmerge_adapter"):
        lora_layers(merged)
    state = get_hrp_state_dict(wrapped(), batches(), lr=LR, config=SHORT)
    with pytest.raises(ModicumError, match="fits no LoRA layer"):
        initialize_lora_hrp_weights(wrapped(), {f"other.{key}": value for key, value in state.items()})


def test_an_untrained_product_everywhere_is_an_error_and_a_broken_one_is_named():
    zero = {"m": (torch.ones(4, 8), torch.zeros(6, 4))}
    with pytest.raises(ModicumError, match="Every preheated product is zero"):
        hrp_state(zero)
    broken = {"a": (torch.ones(4, 8), torch.ones(6, 4)), "b": (torch.ones(4, 8), torch.full((6, 4), torch.nan))}
    with pytest.raises(ModicumError, match="b: a preheated factor is NaN"):
        hrp_state(broken)


def test_an_ungathered_shard_is_refused():
    shard = torch.nn.Parameter(torch.empty(0))
    shard.ds_id = 3
    with pytest.raises(UnsupportedError, match=r"q_proj is a ZeRO-3 shard.*GatheredParameters"):
        whole(shard, "q_proj")
