"""What a model cannot be loaded for is found without its weights; adapters stand on a model in the end."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from jobs.support_route import recipe as route_recipe
from jobs.support_route import write_parts
from modicum.errors import CheckpointError, ModicumError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.loading.models import load_model, load_tokenizer, rehearse_model
from modicum.recipe import parse
from modicum.weights import Checkpoint


def adapter_on(base: Path | str, folder: Path) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["layers.0.self_attn.q_proj"],
              "base_model_name_or_path": str(base)}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    sides = {"A": torch.ones(1, 32), "B": torch.full((32, 1), 0.01)}
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    save_file({name.format(side): tensor for side, tensor in sides.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("ring", [".", "itself", "another"])
def test_an_adapter_that_stands_on_itself_is_one_line(ring, tmp_path):
    place = tmp_path / "one"
    bases = {".": ".", "itself": place, "another": tmp_path / "two"}
    adapter_on(bases[ring], place)
    if ring == "another":
        adapter_on(place, tmp_path / "two")
    data = {"path": "unread.jsonl"}
    asked = [
        lambda: load_model(place),
        lambda: rehearse_model(place),
        lambda: load_tokenizer(place),
        lambda: Checkpoint(place),
        lambda: plan(parse({"job": "train", "model": str(place), "data": data})),
    ]
    for ask in asked:
        with pytest.raises(CheckpointError, match=r"^[^\n]*names itself as its base[^\n]*$"):
            ask()


def test_an_adapter_on_an_adapter_is_loaded_and_its_tokenizer_found(tiny_model, tmp_path):
    upper = adapter_on(adapter_on(tiny_model, tmp_path / "one"), tmp_path / "two")
    found = load_model(upper).merge_and_unload().state_dict()
    read = Checkpoint(upper)
    for name in read:
        assert torch.allclose(found[name], read[name], atol=1e-6)
    changed = found["model.layers.0.self_attn.q_proj.weight"] - load_model(tiny_model).state_dict()[
        "model.layers.0.self_attn.q_proj.weight"]  # fmt: skip
    assert torch.allclose(changed, torch.full((32, 32), 0.02), atol=1e-6)
    assert load_tokenizer(upper).get_vocab() == load_tokenizer(tiny_model).get_vocab()


def test_training_an_adapter_goes_by_its_merge(tiny_model, tmp_path):
    """A check finds it, whether or not the recipe asks for a new adapter; it was transformers' RuntimeError."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    trainer = {"max_steps": 1, "per_device_train_batch_size": 2}
    recipe = {"job": "train", "model": str(adapter_on(tiny_model, tmp_path / "one")), "trainer": trainer,
              "data": str(tmp_path / "rows.jsonl")}  # fmt: skip
    for more in ({}, {"adapter": {"rank": 2}}, {"optimizer": {"name": "mezo", "lr": 1e-4}}):
        asked = parse(recipe | more)
        for act in (plan, lambda asked: execute(asked, tmp_path / "run", quiet=True)):
            with pytest.raises(UnsupportedError, match=r"is an adapter already\. Merge it into its base first"):
                act(asked)


DAMAGED = {
    "wide": lambda folder: rewrite_config(folder, hidden_size=64),
    "deep": lambda folder: rewrite_config(folder, num_hidden_layers=3),
    "vocabulary": lambda folder: rewrite_config(folder, vocab_size=300),
    "type": lambda folder: rewrite_config(folder, model_type="gpt2"),
    "unknown": lambda folder: rewrite_config(folder, model_type="nonsense"),
    "code": lambda folder: rewrite_config(folder, model_type="nonsense", auto_map={"AutoModelForCausalLM": "x.Y"}),
    "quantised": lambda folder: rewrite_config(folder, quantization_config={"quant_method": "gptq", "bits": 4}),
    "config": lambda folder: (folder / "config.json").unlink(),
    "weights": lambda folder: (folder / "model.safetensors").unlink(),
    "twice": lambda folder: (
        shutil.copy(folder / "model.safetensors", folder / "b.safetensors"),
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
    ),
}


def rewrite_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_rehearsal_refuses_what_loading_would_in_the_same_words(damage, tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    assert all(weight.is_meta for weight in rehearse_model(folder).parameters())
    DAMAGED[damage](folder)
    said = []
    for load in (rehearse_model, load_model):
        with pytest.raises(ModicumError, match=r"^[^\n]*$") as error:
            load(folder)
        said.append(str(error.value))
    assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore")
def test_a_routed_model_is_neither_trained_nor_measured_as_a_whole(tmp_path):
    """Its weights stay as they are: a training ended in a RuntimeError, a measurement in words about `exclude`."""
    parts = write_parts(tmp_path)
    routed = execute(parse(route_recipe(parts)), tmp_path / "run", quiet=True).folder / "model"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    shared = {"model": str(routed), "data": {"path": str(tmp_path / "rows.jsonl")}}
    with pytest.raises(UnsupportedError, match="is a routed model, whose weights stay as they are"):
        plan(parse({"job": "train", "trainer": {"max_steps": 1}, **shared}))
    with pytest.raises(UnsupportedError, match="a routed model has no weights of its own to measure"):
        plan(parse({"job": "statistics", "kind": "fisher", **shared}))
