"""Tensors without a model around them, and adapters that bring another vocabulary along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import CheckpointError, ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.weights import Checkpoint, merge_loras
from support import tiny_llama
from weights.families import write_tokenizer


def write(folder: Path, seed: int, *, files: int = 1, suffix: str = ".safetensors") -> Path:
    """Write tensors that belong to no model of transformers."""
    folder.mkdir()
    rng = torch.Generator().manual_seed(seed)
    tensors = {f"block{i}.w": torch.randn(3, 4, generator=rng) for i in range(4)} | {
        "scale": torch.rand((), generator=rng)
    }
    names = sorted(tensors)
    for i in range(files):
        part = {name: tensors[name] for name in names[i::files]}
        file = folder / f"part{i}{suffix}"
        save_file(part, file) if suffix == ".safetensors" else torch.save(part, file)
    return folder


@pytest.mark.parametrize("mergekit", [False, True])
def test_folders_of_tensors_without_a_configuration_merge(tmp_path: Path, mergekit: bool) -> None:
    a, b = write(tmp_path / "a", 0, files=3), write(tmp_path / "b", 1)
    models = [{"model": str(f), "parameters": {"weight": 1.0}} for f in (a, b / "part0.safetensors")]
    ours = {"job": "merge", "experts": [str(a), str(b)], "method": {"name": "linear"}}
    execute(parse({"merge_method": "linear", "models": models} if mergekit else ours), tmp_path / "run", quiet=True)
    made, one, two = (dict(Checkpoint(f)) for f in (tmp_path / "run/model", a, b))
    assert made.keys() == one.keys()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


def test_files_that_both_have_a_tensor_are_refused(tmp_path: Path) -> None:
    a = write(tmp_path / "a", 0, files=2)
    (a / "copy.safetensors").write_bytes((a / "part0.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="another file both have 'block0.w'"):
        Checkpoint(a)
    (a / "config.json").write_text("{}")  # what says that it is a model must be one
    with pytest.raises(CheckpointError, match="but no model.safetensors.index.json"):
        Checkpoint(a)


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_single_pickled_file_is_read_when_asked(tmp_path: Path, suffix: str) -> None:
    files = [write(tmp_path / name, seed, suffix=suffix) / f"part0{suffix}" for seed, name in enumerate("ab")]
    recipe: dict[str, Any] = {"job": "merge", "experts": [str(f) for f in files], "method": {"name": "linear"}}
    with pytest.raises(ModicumError, match="set allow_pickle: true"):
        plan(parse(recipe))
    execute(parse(recipe | {"allow_pickle": True}), tmp_path / "run", quiet=True)
    made, one, two = (dict(Checkpoint(f, allow_pickle=True)) for f in (tmp_path / "run/model", *files))
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)


@torch.no_grad()
def resized(base: Path, out: Path, *, rows: int, modules: list[str], tied: bool) -> torch.Tensor:
    """Write an adapter whose training added tokens; return what the model with the adapter answers to every token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=modules, ensure_weight_tying=tied))
    rng = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad or "embed" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
    wrapped.save_pretrained(out, save_embedding_layers=True)
    # Not merged: of a tied layer, PEFT's merge adds the change to the one matrix twice.
    logits: torch.Tensor = wrapped(input_ids=torch.arange(rows)[None]).logits
    return logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_an_adapter_with_more_tokens_is_what_peft_makes_of_it(tmp_path: Path, tied: bool, modules: list[str]) -> None:
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *"abcdefgh"]
    tiny_llama(vocab_size=len(tokens), tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", tokens)
    both = tied and "embed_tokens" in modules
    expected = resized(tmp_path / "base", tmp_path / "a", rows=14, modules=modules, tied=both)
    write_tokenizer(tmp_path / "a", [*tokens, "<tool>", "<end>"])
    if not tied and "embed_tokens" in modules:  # of which PEFT leaves the resized output layer out of the file
        with pytest.raises(CheckpointError, match=r"with 14 rows, and 'lm_head.weight' has 12"):
            Checkpoint(tmp_path / "a", base=tmp_path / "base")
        return
    read = Checkpoint(tmp_path / "a", base=tmp_path / "base")
    assert read.config["vocab_size"] == 14
    for name, tensor in read.items():
        assert read.spec(name).shape == tensor.shape
    recipe: dict[str, Any] = {"job": "merge", "experts": [str(tmp_path / "a")], "method": {"name": "linear"}}
    execute(parse(recipe), tmp_path / "run", quiet=True)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert made.get_input_embeddings().weight.shape[0] == 14
    with torch.no_grad():
        torch.testing.assert_close(made(input_ids=torch.arange(14)[None]).logits, expected, rtol=1e-4, atol=1e-5)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "run/model")) == 14
    recipe["experts"].append(str(tmp_path / "base"))
    with pytest.raises(ModicumError, match="Set tokenizer: union"):
        plan(parse(recipe))
    assert plan(parse(recipe | {"tokenizer": "union"}))


@pytest.mark.filterwarnings("ignore")
def test_a_vocabulary_that_is_half_new_is_refused(tmp_path: Path) -> None:
    tiny_llama(vocab_size=12, tie_word_embeddings=False).save_pretrained(tmp_path / "base")
    resized(tmp_path / "base", tmp_path / "a", rows=14, modules=["q_proj"], tied=False)
    file = tmp_path / "a/adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "lm_head" not in name}, file)
    with pytest.raises(CheckpointError, match=r"with 14 rows, and 'lm_head.weight' has 12. Save it with all"):
        Checkpoint(tmp_path / "a", base=tmp_path / "base")
    with pytest.raises(CheckpointError):
        merge_loras([tmp_path / "a"], tmp_path / "out")
    assert json.loads((tmp_path / "base/config.json").read_text())["vocab_size"] == 12
