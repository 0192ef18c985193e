"""Python takes the same references as recipes, through the same resolver; no code is fetched or carried unasked."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from modicum.jobs import execute
from modicum.jobs.loading import references
from modicum.recipe import parse
from modicum.record import read_record
from modicum.weights import Checkpoint, average, extract_lora, merge, merge_loras


@pytest.fixture
def named(family, tmp_path, monkeypatch):
    """Names instead of folders: a builtin base, and an expert in the Hub's cache."""
    base, experts = family

    def build(folder):
        shutil.copytree(base, folder, dirs_exist_ok=True)

    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(references, "BUILTINS", {"toy": ("r1", "toy")})
    monkeypatch.setitem(sys.modules, "modicum.jobs.loading.builtins.toy", SimpleNamespace(build=build))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--tuned"
    shutil.copytree(experts[0], repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return "builtin:toy", "me/tuned"


def weights(folder, name="model.safetensors"):
    return (folder / name).read_bytes()


def test_merge_takes_names(named, family, tmp_path):
    base, experts = family
    merge(named[0], [named[1]], tmp_path / "a", method="task_arithmetic")
    merge(base, [experts[0]], tmp_path / "b", method="task_arithmetic")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_average_takes_names(named, family, tmp_path):
    average([*named], tmp_path / "a")
    average([family[0], family[1][0]], tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_adapters_are_extracted_and_merged_by_names(named, family, tmp_path):
    base, experts = family
    extract_lora(named[1], named[0], tmp_path / "a", max_rank=2)
    extract_lora(experts[0], base, tmp_path / "b", max_rank=2)
    assert weights(tmp_path / "a", "adapter_model.safetensors") == weights(tmp_path / "b", "adapter_model.safetensors")
    shutil.copytree(tmp_path / "a", tmp_path / "cache" / "models" / "lora-r1")
    (tmp_path / "cache" / "models" / "lora-r1" / "config.json").write_text("{}")
    references.BUILTINS["lora"] = ("r1", "not built: it is in the cache")
    merge_loras(["builtin:lora", tmp_path / "a"], tmp_path / "c")
    merge_loras([tmp_path / "a", tmp_path / "a"], tmp_path / "d")
    assert weights(tmp_path / "c", "adapter_model.safetensors") == weights(tmp_path / "d", "adapter_model.safetensors")


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_recipe_and_python_make_the_same(named, tmp_path, method):
    recipe = {"job": "merge", "base": named[0], "experts": [named[1]], "method": method}
    made = execute(parse(recipe), tmp_path / "run", quiet=True).folder
    merge(named[0], [named[1]], tmp_path / "python", method=method)
    assert weights(made / "model") == weights(tmp_path / "python")


def test_an_adapter_may_name_its_base_relative_to_itself(family, tmp_path):
    base, experts = family
    extract_lora(experts[0], base, tmp_path / "adapter", max_rank=2)
    whole = dict(Checkpoint(tmp_path / "adapter"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "../base"})
    )
    again = dict(Checkpoint(tmp_path / "adapter"))
    assert all(tensor.equal(whole[name]) for name, tensor in again.items())


def test_the_code_of_a_model_is_left_out_unless_it_is_allowed(family, tmp_path):
    base, experts = family
    (base / "modeling_own.py").write_text("raise SystemExit")
    for made, carried in (("plain", False), ("allowed", True)):
        opened = Checkpoint(base, remote_code=carried)
        merge(opened, experts, tmp_path / made, method="task_arithmetic")
        average([experts[0], opened], tmp_path / f"{made}-average")  # what is no weight comes from the newest
        for folder in (tmp_path / made, tmp_path / f"{made}-average"):
            assert (folder / "modeling_own.py").exists() == carried


@pytest.mark.parametrize("allowed", [False, True])
def test_a_recipe_says_whether_code_comes_along(family, tmp_path, allowed):
    base, experts = family
    (base / "modeling_own.py").write_text("raise SystemExit")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}))
    models = [str(base), str(experts[0])]
    for recipe in (
        {"job": "merge", "base": models[0], "experts": models[1:], "method": "task_arithmetic"},
        {"job": "average", "checkpoints": models[::-1]},
    ):
        run = execute(parse(recipe | {"remote_code": allowed}), tmp_path / recipe["job"], quiet=True)
        assert (run.folder / "model" / "modeling_own.py").exists() == allowed
        assert any("remote_code" in note for note in read_record(run.folder)["notes"]) != allowed


def test_the_hub_is_asked_for_what_was_allowed(monkeypatch, tmp_path, family):
    asked = []

    def download(_, *, allow_patterns, **__):
        asked.append(set(allow_patterns))
        return str(family[0])

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    Checkpoint("me/tuned")
    Checkpoint("me/tuned", allow_pickle=True, remote_code=True)
    assert not asked[0] & {"*.py", "*.bin"} and {"*.py", "*.bin"} <= asked[1]


def test_a_single_file_is_a_model_for_recipes_too(family, tmp_path):
    base, experts = family
    save_file(load_file(experts[0] / "model.safetensors"), tmp_path / "one.safetensors")
    recipe = {"job": "merge", "base": str(base), "experts": [str(tmp_path / "one.safetensors")]}
    made = execute(parse(recipe | {"method": "task_arithmetic"}), tmp_path / "run", quiet=True).folder
    assert (made / "model" / "model.safetensors").exists()
