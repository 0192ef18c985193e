"""What the baselines that PEFT implements hand to it, and what is made of what it returns."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from modicum.adapters.layers import lora_layers
from modicum.jobs.training.adapter import make_optimizer, peft_config
from modicum.random import generator
from modicum.registry import adapter_init
from support import tiny_llama


def wrap(name, knobs=None, **fields):
    settings = {"rank": 4, "lora_alpha": 12, "target_modules": ["q_proj", "up_proj"]} | fields
    return get_peft_model(tiny_llama(), peft_config(name, knobs or {}, **settings))


def test_lora_plus_trains_b_faster_and_decays_both():
    model = wrap("lora_plus")
    optimizer = make_optimizer(model, "lora_plus", {"ratio": 4.0}, lr=0.1, weight_decay=0.3)
    named = {id(p): name for name, p in model.named_parameters()}
    seen = {
        (named[id(p)].split(".")[-3], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert seen == {("lora_A", 0.1, 0.3), ("lora_B", 0.4, 0.3)}


@pytest.mark.parametrize("rslora", [False, True])
def test_lora_fa_projects_by_the_scaling_of_each_layer_and_decays(rslora):
    model = wrap("lora_fa", use_rslora=rslora)
    optimizer = make_optimizer(model, "lora_fa", {}, lr=0.1, weight_decay=0.3)
    scaling = {layer.scaling["default"] for layer in lora_layers(model).values()}
    for group in optimizer.param_groups:
        assert (group["lr"], group["weight_decay"]) == (0.1, 0.3)
        assert set(group["scaling_factors"]) - {None} == scaling == {6.0 if rslora else 3.0}


def test_rslora_and_dora_are_fields_of_pefts_configuration():
    assert {layer.scaling["default"] for layer in lora_layers(wrap("rslora")).values()} == {6.0}
    assert any("lora_magnitude_vector" in name for name, _ in wrap("dora").named_parameters())
    plain = wrap("default")
    assert {layer.scaling["default"] for layer in lora_layers(plain).values()} == {3.0}
    # A field of the caller's wins over one of the method.
    assert peft_config("rslora", {}, rank=4, use_rslora=False).use_rslora is False


def test_the_knobs_of_adalora_reach_its_configuration():
    config = peft_config(
        "adalora",
        {"spare": 2.5, "orthogonality": 0.125, "interval": 7},
        rank=4,
        lora_alpha=12,
        target_modules=["q_proj"],
    )
    assert isinstance(config, AdaLoraConfig)
    assert (config.init_r, config.target_r, config.orth_reg_weight, config.deltaT) == (10, 4, 0.125, 7)
    layer = get_peft_model(tiny_llama(), config).base_model.model.model.layers[0].self_attn.q_proj
    # PEFT divides by the rank to begin with; the scaling stays alpha over the final one.
    assert layer.scaling["default"] / layer.ranknum["default"] == pytest.approx(12 / 4)
    # Without an alpha it is twice the rank, as everywhere.
    assert peft_config("adalora", {}, rank=4).lora_alpha == 2 * 4 * 6 / 4


def saved_adalora(ranks):
    """Tensors and configuration as PEFT saves them, each module with this many values that are not zero."""
    rng, tensors = generator(0, "adalora"), {}
    for name, rank in ranks.items():
        E = torch.zeros(6, 1)
        E[torch.randperm(6, generator=rng)[:rank]] = torch.randn(rank, 1, generator=rng)
        tensors |= {
            f"{name}.lora_A": torch.randn(6, 10, generator=rng),
            f"{name}.lora_E": E,
            f"{name}.lora_B": torch.randn(8, 6, generator=rng),
        }
    config = {"peft_type": "ADALORA", "init_r": 6, "target_r": 4, "lora_alpha": 18.0, "tinit": 3, "base": "b"}
    return tensors | {"head.weight": torch.ones(2)}, config


def test_an_adalora_that_lost_every_rank_keeps_one_of_no_effect():
    made, plain = adapter_init["adalora"].facts.plain(*saved_adalora({"m.none": 0}))
    assert plain["r"] == 1 and not (made["m.none.lora_B.weight"] @ made["m.none.lora_A.weight"]).any()


def test_a_saved_adalora_becomes_plain_lora_with_the_same_changes():
    ranks = {"m.one": 5, "m.two": 2, "m.none": 0}
    tensors, config = saved_adalora(ranks)
    before = {key: value.clone() for key, value in tensors.items()}
    made, plain = adapter_init["adalora"].facts.plain(tensors, config)
    assert all(torch.equal(value, tensors[key]) for key, value in before.items())
    loaded = LoraConfig(**{key: value for key, value in plain.items() if key != "peft_type"})
    assert plain["peft_type"] == "LORA" and loaded.r == 5 and "tinit" not in plain and "base" not in plain
    assert torch.equal(made["head.weight"], torch.ones(2)) and len(made) == 1 + 2 * 3
    for name in ranks:
        A, E, B = (tensors[f"{name}.lora_{part}"] for part in "AEB")
        ours = made[f"{name}.lora_B.weight"] @ made[f"{name}.lora_A.weight"]
        assert made[f"{name}.lora_A.weight"].shape == (5, 10)
        # PEFT adds 1e-5 to the rank that it divides by.
        torch.testing.assert_close(loaded.lora_alpha / loaded.r * ours, 18 / (6 + 1e-5) * B @ (E * A))
