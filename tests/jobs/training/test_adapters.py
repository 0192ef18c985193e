"""The seam to PEFT: every initialisation by name, what is saved, resuming, exporting."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from modicum.adapters.calibrate import input_moments, weight_gradients
from modicum.adapters.layers import factors_of, lora_layers
from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.jobs import execute
from modicum.jobs.training.adapter import (
    after_backward,
    initialize,
    make_optimizer,
    peft_config,
    step_callback,
)
from modicum.random import generator
from modicum.recipe import parse
from modicum.registry import adapter_init
from support import tiny_llama

TOTAL = 4
QUICK = {name: {"preheat_rank": 8, "preheat_steps": 2} for name in ("hrp", "lora_squeeze")}
LR = 1e-3


def batches(count=4):
    rng = generator(0, "batches")
    return [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 264, (count, 2, 12), generator=rng)]


def wrap(name="default", **config):
    settings = {"rank": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    return get_peft_model(tiny_llama(), peft_config(name, {}, **settings)).eval()


def start(model, name, knobs=None, data=None, **options):
    knobs = QUICK.get(name, {}) | (knobs or {})
    options = {"total_steps": TOTAL} | options
    return initialize(model, name, knobs, batches=lambda: batches() if data is None else data, lr=LR, **options)


def train(model, name="default", steps=2):
    optimizer = make_optimizer(model, name, {}, lr=LR) or torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=LR
    )
    model.train()
    for step, batch in enumerate(batches(steps)):
        model(**batch).loss.backward()
        optimizer.step()
        after_backward(model, name, step)
        optimizer.zero_grad()
    model.eval()


IDS = torch.arange(3, 23)[None]
# What changes the base's numbers at rest: LoRA-One and LoRA-Squeeze by design, LoftQ by quantising, DoRA by rounding.
MOVES = {"lora_one", "loftq", "dora", "lora_squeeze"}


@pytest.mark.parametrize("name", sorted(set(adapter_init) - {"loftq"}))
def test_every_initialisation_trains_and_its_adapter_fits_the_original_base_in_stock_peft(name, tmp_path):
    base = tiny_llama().eval()
    expected = base(IDS).logits
    model = wrap(name)
    started = start(model, name)
    if name not in MOVES:
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, name)
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    trained = model(IDS).logits
    assert not torch.allclose(trained, expected, atol=1e-5)
    started.prepare(model)
    model.save_pretrained(tmp_path)
    started.finish(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert json.loads((tmp_path / "adapter_init.json").read_text())["name"] == name
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, trained, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["hrp", "pissa", "lora_one", "default"])
def test_a_resumed_run_starts_from_the_same_factors_without_looking_at_the_data(name, tmp_path):
    models, cache = [wrap(), wrap()], tmp_path / "start.safetensors"
    started = [
        start(models[0], name, {"rank_redistribution": "eva"} if name == "hrp" else {}, cache=cache),
        start(models[1], name, {"rank_redistribution": "eva"} if name == "hrp" else {}, cache=cache, data=[]),
    ]
    first, second = (dict(model.named_parameters()) for model in models)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert started[0].initial.keys() == started[1].initial.keys()
    assert started[0].origin == started[1].origin
    kept = cache.read_bytes()
    for number, damaged in enumerate((b"cut", kept[:-1] + bytes([kept[-1] ^ 1]), b"")):
        cache.write_bytes(damaged)
        again = start(wrap(), name, {"rank_redistribution": "eva"} if name == "hrp" else {}, cache=cache)
        assert any("start.safetensors is damaged: the adapter's start is found anew" in note for note in again.notes)
        assert cache.with_name("start.safetensors.aside").read_bytes() == damaged
        assert cache.read_bytes() == kept and torch.equal(again.digest, started[0].digest), number


def test_seeds_name_the_draws():
    rows = []
    for seed in (0, 0, 1):
        model = wrap()
        start(model, "default", seed=seed)
        rows.append(torch.cat([factors_of(layer, "default")[0].flatten() for layer in lora_layers(model).values()]))
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])


def test_frozen_factors_stay_frozen():
    for name, frozen in (("mica", "lora_B"), ("lora_fa", "lora_A")):
        model = wrap()
        start(model, name)
        flags = {n: p.requires_grad for n, p in model.named_parameters() if ".lora_" in n}
        assert all(flag == (frozen not in n) for n, flag in flags.items())


def test_methods_bring_their_own_optimizer_only_where_they_have_one():
    model = wrap()
    assert make_optimizer(model, "hrp", {}, lr=LR) is None
    plus = make_optimizer(model, "lora_plus", {"ratio": 4.0}, lr=LR)
    assert {round(group["lr"] / LR, 6) for group in plus.param_groups} >= {1.0, 4.0}
    assert make_optimizer(model, "lora_fa", {}, lr=LR) is not None


def test_the_geometry_tells_how_far_directions_turned_and_what_the_rank_held(tmp_path):
    model, cache = wrap(), tmp_path / "start.safetensors"
    started = start(model, "hrp", {"preheat_rank": 12, "preheat_steps": 3}, cache=cache)
    layer = lora_layers(model)["model.layers.0.self_attn.q_proj"]
    with torch.no_grad():
        A = layer.lora_A["default"].weight
        left_out = torch.linalg.svd(A).Vh[4]
        A[0] = left_out  # one of four directions is turned by a right angle
    model.save_pretrained(tmp_path / "adapter")
    started.finish(tmp_path / "adapter")
    found = json.loads((tmp_path / "adapter" / "adapter_geometry.json").read_text())
    place = found["modules"].index("model.layers.0.self_attn.q_proj")
    assert found["turned_A"][place] == pytest.approx(90 / 4, abs=0.1)
    assert found["turned_A"][place + 1] == pytest.approx(0, abs=0.1) and set(found["turned_B"]) == {None}
    energy = started.spectra["model.layers.0.self_attn.q_proj"].double().square()
    assert len(energy) == 12 and found["held"][place] == pytest.approx(float(energy[:4].sum() / energy.sum()), abs=1e-4)
    assert found["shares"]["least"][-1] == 1.0 and found["shares"]["median"] == sorted(found["shares"]["median"])
    resumed = start(wrap(), "hrp", {"preheat_rank": 12, "preheat_steps": 3}, cache=cache, data=[])
    assert all(torch.equal(resumed.spectra[name], S) for name, S in started.spectra.items())


def test_eva_may_share_its_ranks_out_by_explained_variance(tmp_path):
    model = wrap()
    scaling = {layer.scaling["default"] for layer in lora_layers(model).values()}
    start(model, "eva", {"rank_redistribution": "eva", "rho": 1.5})
    layers = lora_layers(model)
    ranks = {name: layer.r["default"] for name, layer in layers.items()}
    assert sum(ranks.values()) == 4 * len(ranks) and max(ranks.values()) <= 6 and len(set(ranks.values())) > 1
    # One more direction never explains more of its own input than the last one that another module kept.
    moments = input_moments(wrap(), batches())
    shares = {name: torch.linalg.eigvalsh(C.double()).flip(0) / C.double().trace() for name, C in moments.items()}
    dropped = max(float(shares[name][rank]) for name, rank in ranks.items() if rank < 6)
    assert dropped <= min(float(shares[name][rank - 1]) for name, rank in ranks.items() if rank > 1) + 1e-6
    assert {layer.scaling["default"] for layer in layers.values()} == scaling
    for name, layer in layers.items():
        A = layer.lora_A["default"].weight.detach()
        torch.testing.assert_close(A @ A.T, torch.eye(ranks[name]), atol=1e-4, rtol=0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert {name: layer.r["default"] for name, layer in lora_layers(loaded).items()} == ranks


def test_lora_squeeze_keeps_the_best_part_of_what_a_wider_adapter_learned():
    wide, models = {"preheat_rank": 8, "preheat_steps": 3}, (wrap(), wrap())
    start(models[0], "lora_squeeze", wide)
    start(models[1], "hrp", wide | {"init_factor": "balanced"})
    for one, other in zip(models[0].parameters(), models[1].parameters()):
        assert torch.equal(one, other)
    assert not torch.equal(models[0].eval()(IDS).logits, tiny_llama().eval()(IDS).logits)


def test_adalora_spends_its_ranks_where_they_matter_and_is_saved_as_plain_lora(tmp_path):
    model = wrap("adalora")
    started = start(model, "adalora", total_steps=10)
    config = model.peft_config["default"]
    assert (config.init_r, config.target_r, config.total_step, config.tinit, config.tfinal) == (6, 4, 10, 1, 3)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] / layer.r["default"] == 2.0  # alpha over the final rank
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for step, batch in enumerate(batches(10)):
        model(**batch).loss.backward()
        optimizer.step()
        after_backward(model, "adalora", step)
        optimizer.zero_grad()
    ranks = [int((p != 0).sum()) for name, p in model.named_parameters() if "lora_E" in name]
    assert sum(ranks) == 4 * 14 and len(set(ranks)) > 1
    expected = model.eval()(IDS).logits
    started.prepare(model)
    model.save_pretrained(tmp_path)
    started.finish(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert {type(loaded.peft_config["default"]), loaded.peft_config["default"].r} == {LoraConfig, max(ranks)}
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=2e-5, rtol=1e-4)


def test_a_recipe_trains_adalora_through_the_trainer_and_cannot_go_on_from_its_checkpoint(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"row {i} of a few"}) for i in range(16)))
    data = {
        "job": "train",
        "model": {"path": str(tiny_model), "dtype": "float32"},
        "data": {"path": str(rows)},
        "adapter": {"rank": 2, "init": {"name": "adalora", "warmup": 0.2, "settled": 0.2}},
        "trainer": {"max_steps": 5, "learning_rate": 5e-2, "save_strategy": "no", "per_device_train_batch_size": 2},
    }
    run = execute(parse(data), tmp_path / "run", quiet=True)
    config = json.loads((run.folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["lora_alpha"] / config["r"] == pytest.approx(2.0, rel=1e-4)
    adapter = load_file(run.folder / "adapter" / "adapter_model.safetensors")
    kept = [int((B != 0).any(0).sum()) for key, B in adapter.items() if "lora_B" in key]
    assert 0 < sum(kept) <= 2 * 14
    state = SimpleNamespace(global_step=3)
    with pytest.raises(UnsupportedError, match="adalora cannot go on from a checkpoint"):
        step_callback("adalora").on_train_begin(None, state, None)
    assert step_callback("hrp") is None


def test_adalora_that_cannot_plan_is_refused():
    with pytest.raises(ModicumError, match="plans its ranks over the whole run"):
        start(wrap("adalora"), "adalora", total_steps=None)
    with pytest.raises(ModicumError, match="no step left to drop ranks in"):
        start(wrap("adalora"), "adalora", {"warmup": 0.6, "settled": 0.5}, total_steps=10)
    with pytest.raises(UnsupportedError, match="AdaLoRA adapters cannot be started"):
        start(wrap("adalora"), "pissa")


def test_continuing_after_preheating_says_how_much_was_seen():
    assert start(wrap(), "hrp", {"reuse_data": "continue"}, accumulation=3).consumed == 6
    assert start(wrap(), "hrp").consumed == 0


def test_the_origin_says_what_was_preheated():
    started = start(wrap(), "hrp", {"preheat_steps": None}, total_steps=100)
    assert started.origin["preheat_steps"] == 10 and started.origin["preheat_rank"] == 8
    json.dumps(started.origin)


def test_a_clipped_preheating_rank_is_noted():
    started = start(wrap(), "hrp", {"preheat_rank": 24})
    assert started.notes == ["hrp: preheating rank 24 was clipped to the short side of 4 modules."]
    assert start(wrap(), "hrp").notes == []


def test_gradients_are_those_of_the_frozen_weights_averaged_over_batches():
    model = wrap()
    found = weight_gradients(model, batches())
    base = tiny_llama()
    sum(base(**batch).loss for batch in batches()).backward()
    for name, gradient in found.items():
        expected = base.get_parameter(f"{name}.weight").grad / 4
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in model.parameters())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".lora_" in n
    }


def test_moments_leave_padding_out_and_no_hook_behind():
    model = wrap(target_modules=["q_proj"])
    ids = batches(1)[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros_like(ids)], 1)
    mask = (torch.arange(24) < 12).long().expand(2, -1)
    alone = input_moments(model, [{"input_ids": ids}])
    with_padding = input_moments(model, [{"input_ids": padded, "attention_mask": mask}])
    for name, value in alone.items():
        torch.testing.assert_close(with_padding[name], value, atol=1e-5, rtol=1e-4)
        assert torch.equal(value, value.T) or torch.allclose(value, value.T)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_wrong_wishes_are_refused():
    with pytest.raises(RecipeError, match="no adapter initialisation 'hpr'. Did you mean 'hrp'"):
        start(wrap(), "hpr")
    with pytest.raises(RecipeError, match="unknown key 'preheat_stpes'. Did you mean 'preheat_steps'"):
        start(wrap(), "hrp", {"preheat_stpes": 3})
    with pytest.raises(RecipeError, match="unknown key 'rank'"):
        start(wrap(), "pissa", {"rank": 3})
    with pytest.raises(RecipeError, match=r"preheat_steps.*greater than 0"):
        start(wrap(), "hrp", {"preheat_steps": 0})
    for name in ("hrp", "lora_ga", "eva"):
        with pytest.raises(ModicumError, match="give no batch to start the adapter from"):
            start(wrap(), name, data=[])


@pytest.mark.skipif(torch.cuda.is_available(), reason="PEFT quantises on this device")
def test_loftq_says_what_it_needs():
    with pytest.raises(UnsupportedError, match="bitsandbytes on a CUDA device"):
        wrap("loftq")


def test_a_quantised_base_is_fine_for_hrp_and_refused_by_what_must_shift_it():
    model = wrap()
    for layer in lora_layers(model).values():
        layer.get_base_layer().weight.quant_state = "nf4"  # the mark that bitsandbytes leaves
    start(model, "hrp")
    start(model, "default")
    for name in ("pissa", "lora_ga"):
        with pytest.raises(UnsupportedError, match="is quantised"):
            start(model, name)
