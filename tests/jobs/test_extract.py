"""Adapters that are taken out of models load in PEFT and give the model back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.weights import Checkpoint
from weights.families import make_family

FAMILIES = ("llama", "gpt2", "qwen2", "mixtral", "neox", "mamba")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        make_family(folder / family, family)
    return folder


def recipe(folder: Path, **more: Any) -> dict[str, Any]:
    return {"job": "extract", "model": str(folder / "a"), "base": str(folder / "base"), "max_rank": 64} | more


def load(folder: Path, adapter: Path | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)


@pytest.mark.filterwarnings("error:.*missing adapter keys")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_of_full_rank_is_the_model(models: Path, tmp_path: Path, family: str) -> None:
    folder = models / family
    execute(parse(recipe(folder)), tmp_path / "run", quiet=True)
    adapter = tmp_path / "run/adapter"
    merged = load(folder / "base", adapter).merge_and_unload()
    tuned = load(folder / "a")
    modules = {name for name, module in tuned.named_modules()
               if isinstance(module, torch.nn.Linear | transformers.pytorch_utils.Conv1D)}  # fmt: skip
    made, wanted, base = merged.state_dict(), tuned.state_dict(), load(folder / "base").state_dict()
    changed = 0
    for name, tensor in made.items():
        extracted = name.removesuffix(".weight") in modules and "lm_head" not in name and "embed_out" not in name
        extracted &= not name.endswith((".gate.weight", ".out_proj.weight"))  # PEFT has no factors of Mamba's outputs
        torch.testing.assert_close(tensor, (wanted if extracted else base)[name], rtol=1e-4, atol=1e-5)
        changed += extracted
    assert changed >= 8
    again = Checkpoint(adapter, base=folder / "base")  # and our own reading of it is PEFT's
    for name in again:
        if name in made:
            torch.testing.assert_close(again[name], made[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changed", ["", "bias", "ln_1.weight", "c_fc.bias"])
@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_what_has_no_low_rank_form_is_loaded_by_peft_too(
    models: Path, tmp_path: Path, changed: str, prefix: str
) -> None:
    base, tuned = (load_file(models / "gpt2" / name / "model.safetensors") for name in ("base", "a"))
    some = {name: tensor for name, tensor in tuned.items() if name.endswith(("h.0.attn.c_attn.weight", changed))}
    for name, tensors in {"base": base, "a": base | some}.items():
        file = tmp_path / name / "model.safetensors"
        file.parent.mkdir()
        renamed = {prefix + key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        save_file(renamed, file, {"format": "pt"})
        (file.parent / "config.json").write_bytes((models / "gpt2" / name / "config.json").read_bytes())
    execute(parse(recipe(tmp_path, save_rest=True)), tmp_path / "run", quiet=True)
    ids = torch.arange(20)[None]
    loaded = load(tmp_path / "base", tmp_path / "run/adapter")
    for model in (loaded, loaded.merge_and_unload()):
        torch.testing.assert_close(
            model.eval()(ids).logits, load(tmp_path / "a").eval()(ids).logits, rtol=1e-3, atol=1e-4
        )
    opened, whole = Checkpoint(tmp_path / "run/adapter"), Checkpoint(tmp_path / "a")
    for name in opened:  # and our own reading of it is PEFT's
        torch.testing.assert_close(opened[name], whole[name], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["t5", "gemma3vl"])
def test_models_of_several_parts_are_given_back_whole(tmp_path: Path, family: str) -> None:
    make_family(tmp_path / family, family)
    folder = tmp_path / family
    execute(parse(recipe(folder, save_rest=True)), tmp_path / "run", quiet=True)
    auto = transformers.AutoModelForSeq2SeqLM if family == "t5" else transformers.AutoModelForImageTextToText
    merged = peft.PeftModel.from_pretrained(auto.from_pretrained(folder / "base"), tmp_path / "run/adapter")
    made, wanted = merged.merge_and_unload().state_dict(), auto.from_pretrained(folder / "a").state_dict()
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    opened, whole = Checkpoint(tmp_path / "run/adapter"), Checkpoint(folder / "a")
    for name in opened:
        torch.testing.assert_close(opened[name], whole[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_difference_without_a_matrix_is_no_adapter(models: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    tensors = load_file(models / "llama/base/model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(16)}, tmp_path / "a/model.safetensors", {"format": "pt"})
    (tmp_path / "a/config.json").write_bytes((models / "llama/base/config.json").read_bytes())
    with pytest.raises(ModicumError, match="in no matrix that has a low-rank form, but in 'model.norm.weight'"):
        execute(parse(recipe(models / "llama", model=str(tmp_path / "a"), save_rest=True)), tmp_path / "r", quiet=True)


@pytest.mark.filterwarnings("ignore")
def test_names_without_a_prefix_find_their_modules(models: Path, tmp_path: Path) -> None:
    for name in ("base", "a"):
        file = tmp_path / name / "model.safetensors"
        file.parent.mkdir()
        tensors = load_file(models / "gpt2" / name / "model.safetensors")
        save_file({key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}, file, {"format": "pt"})
        (file.parent / "config.json").write_bytes((models / "gpt2" / name / "config.json").read_bytes())
    execute(parse(recipe(tmp_path)), tmp_path / "run", quiet=True)
    merged = load(tmp_path / "base", tmp_path / "run/adapter").merge_and_unload().state_dict()
    name = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(merged[name], load(models / "gpt2/a").state_dict()[name], rtol=1e-4, atol=1e-5)


def test_the_plan_tells_what_is_left_out(models: Path) -> None:
    lines = plan(parse(recipe(models / "mixtral", max_rank=2)))
    assert lines[0].startswith("16 matrices of")
    assert any("48 tensors, such as" in line and "no place of their own" in line for line in lines)
    assert len(plan(parse(recipe(models / "llama")))) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"energy": 1.5}, "energy"),
        ({"max_rank": 0}, "max_rank"),
        ({"exclude": "nothing"}, "matches no tensor"),
        ({"exclude": "weight"}, "Exclude less"),
        ({"model": "none"}, "no folder none|no model folder"),
    ],
)
def test_bad_recipes_are_refused_by_the_plan(models: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModicumError, match=message):
        plan(parse(recipe(models / "llama", **change)))


@pytest.mark.parametrize("case", ["itself", "copy", "norm"])
def test_models_without_a_difference_are_refused_by_check_as_by_run(models: Path, tmp_path: Path, case: str) -> None:
    base = models / "llama/base"
    given = base if case == "itself" else shutil.copytree(base, tmp_path / "copy")
    if case == "norm":
        tensors = load_file(base / "model.safetensors")
        tensors["model.norm.weight"] += 1
        save_file(tensors, given / "model.safetensors", {"format": "pt"})
    document = parse(recipe(models / "llama", model=str(given)))
    message = r"in no matrix .* but in 'model\.norm\.weight'" if case == "norm" else "there is nothing to extract"
    for attempt in (lambda: plan(document), lambda: execute(document, tmp_path / "run", quiet=True)):
        with pytest.raises(ModicumError, match=message):
            attempt()


def test_ranks_and_shares_are_recorded(models: Path, tmp_path: Path) -> None:
    run = execute(parse(recipe(models / "llama", max_rank=3, dtype="bfloat16")), tmp_path / "run", quiet=True)
    metrics = run.record["metrics"]
    assert (metrics["modules"], metrics["rank"]) == (28, 3)
    assert 0 < metrics["energy"] < 1
    assert set(metrics["ranks"]) == set(metrics["energies"])
    assert "LoRA extraction" in (tmp_path / "run/adapter/README.md").read_text()


@pytest.mark.filterwarnings("ignore")
def test_what_the_adapter_leaves_out_is_said(models: Path, tmp_path: Path) -> None:
    run = execute(parse(recipe(models / "llama")), tmp_path / "run", quiet=True)
    (told,) = [note for note in run.record["notes"] if "differ too" in note]
    assert told.startswith("11 tensors that have no low-rank form") and "save_rest: true" in told
    run = execute(parse(recipe(models / "llama", save_rest=True)), tmp_path / "whole", quiet=True)
    assert not [note for note in run.record["notes"] if "differ too" in note]
