"""Exporting an adapter for servers: one rank, one scaling, the same effect."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modicum.adapters.layers import factors_of, lora_layers
from modicum.errors import CheckpointError, UnsupportedError
from modicum.jobs.loading.serving import export_adapter
from modicum.random import generator
from support import tiny_llama

IDS = torch.arange(3, 23)[None]


def wrap(**config):
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | config
    return get_peft_model(tiny_llama(), LoraConfig(**settings)).eval()


def filled(model):
    """Give every B numbers, as after training."""
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            B = factors_of(layer, "default")[1]
            B.copy_(0.1 * torch.randn(B.shape, generator=generator(0, name)))
    return model


def exported(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    return export_adapter(tmp_path / "adapter", tmp_path / "served")


def test_an_export_has_one_rank_no_patterns_and_the_same_effect(tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"q_proj": 3, "up_proj": 5}}
    model = filled(wrap(use_rslora=True, **patterns))
    expected = model(IDS).logits
    told = exported(model, tmp_path)
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert told == {"rank": 6, "alpha": config["lora_alpha"], "modules": 14} and config["r"] == 6
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "served").eval()
    torch.testing.assert_close(loaded(IDS).logits, expected, atol=1e-5, rtol=1e-4)
    assert len({layer.scaling["default"] for layer in lora_layers(loaded).values()}) == 1


def test_a_uniform_adapter_passes_through_unchanged(tmp_path):
    exported(filled(wrap()), tmp_path)
    names = ("adapter", "served")
    first, second = (PeftModel.from_pretrained(tiny_llama(), tmp_path / name).state_dict() for name in names)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_servers_refuse_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="use_dora"):
        exported(wrap(use_dora=True), tmp_path / "dora")
    with pytest.raises(UnsupportedError, match="servers refuse"):
        exported(wrap(target_modules=["q_proj"], modules_to_save=["norm"]), tmp_path / "saved")
    exported(wrap(), tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        export_adapter(tmp_path / "adapter", tmp_path / "served")
