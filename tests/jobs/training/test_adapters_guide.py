"""The code of the guide's page on adapters runs as it stands, on small parts."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from modicum.adapters.layers import factors_of, lora_layers
from modicum.random import generator
from modicum.recipe import parse, parse_yaml
from support import tiny_llama

GUIDE = (Path(__file__).parents[3] / "docs" / "guide" / "adapters.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)


def run(holds, names):
    [code] = [text for text in blocks("python") if holds in text]
    exec(code, names)


def batches(count):
    ids = torch.randint(3, 264, (count, 2, 12), generator=generator(0, "batches"))
    return [{"input_ids": rows, "labels": rows} for rows in ids]


def trained(model):
    for batch in batches(2):
        model(**batch).loss.backward()


def test_the_examples_of_preheating_run():
    names = {"base": tiny_llama(), "batches": batches(50), "train": trained}
    run("get_hrp_state_dict(model", names)
    layers = lora_layers(names["model"])
    assert len(names["state"]) == 3 * len(layers)
    assert not any(factors_of(layer, "default")[1].any() for layer in layers.values())

    def with_a_step(model):
        trained(model)
        with torch.no_grad():
            for parameter in names["stage"].parameters():
                parameter.sub_(parameter.grad)

    names["train"] = with_a_step
    run("preheating(model", names)
    assert all(S[0] > 0 for key, S in names["state"].items() if key.endswith(".S"))


def test_the_seam_for_a_loop_of_ones_own_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"base": tiny_llama(), "loader": batches(20), "get_peft_model": get_peft_model, "torch": torch}
    [code] = [text for text in blocks("python") if "after_backward(model" in text]
    exec(code.replace("total_steps=500", "total_steps=20"), names)
    loaded = PeftModel.from_pretrained(tiny_llama(), "adapter")
    assert loaded.peft_config["default"].init_lora_weights is True


def test_the_serving_example_says_what_it_returns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = get_peft_model(tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    model.save_pretrained("runs/mine/adapter")
    run("export_adapter(", {})
    assert Path("runs/mine/served/adapter_model.safetensors").exists()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_every_recipe_is_valid(text):
    assert parse(parse_yaml(text)).job == "train"
