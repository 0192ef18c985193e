"""A run is what its result depends on: every byte of every input, whatever its size, and nothing besides."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from modicum import record, registry
from modicum.content import BLOCK
from modicum.inputs import look
from modicum.jobs import execute, open_run
from modicum.jobs.loading import references
from modicum.recipe import parse
from modicum.record import read_record
from support import tiny_family

DATA = {"path": "rows.jsonl", "max_length": 32}
JOBS = {
    "merge": {"job": "merge", "base": "base", "experts": ["one", "two"], "method": "task_arithmetic"},
    "statistics-merge": {"job": "merge", "base": "base", "experts": ["one"], "method": "fisher", "statistics": ["two"]},
    "mergekit": {"merge_method": "linear", "dtype": "float32", "parameters": {"weight": 1},
                 "models": [{"model": "one"}, {"model": "two"}]},
    "average": {"job": "average", "checkpoints": ["one", "two"]},
    "train": {"job": "train", "model": "base", "data": DATA, "adapter": {"rank": 2}},
    "compare": {"job": "train", "model": "base", "data": DATA,
                "adapter": {"rank": 2, "init": "default", "compare": "one"}},
    "evaluate": {"job": "evaluate", "models": {"a": "one", "b": "adapter"},
                 "tasks": {"say": {"kind": "exact_match", "data": DATA}}},
    "statistics": {"job": "statistics", "model": "one", "kind": "fisher", "data": DATA},
    "calibrate": {"job": "calibrate", "model": "one", "data": DATA},
    "pipeline": {"job": "pipeline", "stages": [{"name": "a", "job": "average", "checkpoints": ["one", "two"]}]},
    "merge-tokenizer": {"job": "merge", "experts": ["one", "two"], "method": "linear", "tokenizer": {"source": "base"},
                        "statistics": []},
    "merge-stranger": {"job": "merge", "experts": ["one"], "method": "linear", "tokenizer": "./base"},
    "mergekit-stranger": {"merge_method": "linear", "parameters": {"weight": 1}, "models": [{"model": "one"}],
                          "tokenizer_source": "two"},
    "trainer-files": {"job": "train", "model": "base", "data": DATA, "trainer": {"fsdp_config": "settings.json"}},
    "export": {"job": "export", "model": "one"},
    "extract": {"job": "extract", "model": "one", "base": "base"},
    "transplant": {"job": "transplant", "model": "one", "donor": "two"},
    "moe": {"base_model": "base", "gate_mode": "random",
            "experts": [{"source_model": "one"}, {"source_model": "two"}]},
    "search": {"job": "search", "merge": {"merge_method": "linear", "parameters": {"weight": 1},
                                          "models": [{"model": "one"}], "tokenizer": {"source": "./base"}},
               "knobs": {"weight": {"low": 0, "high": 1}},
               "tasks": {"say": {"kind": "exact_match", "data": DATA}}},
    "route": {"job": "route", "base": "base", "experts": {"a": "one", "b": "two"}, "rule": "all", "store": "sign",
              "data": {"a": {"path": "rows.jsonl"}, "b": {"path": "rows.jsonl"}}},
    "grid": {"job": "grid", "axes": {"of": {"a": {"base": "one"}, "b": {"base": "two"}}},
             "stages": [{"name": "m", "over": ["of"], "job": "merge", "experts": ["two"], "method": "magmax"}]},
    "attack": {"job": "attack", "targets": {"base": "one"}, "suites": {"plain": "plain"},
               "goals": {"path": "rows.jsonl", "size": 3}, "benign": {"path": "rows.jsonl", "size": 3}},
    "synthesize": {"job": "synthesize", "teacher": "one", "illegal": {"path": "rows.jsonl", "size": 3},
                   "helpful": {"path": "rows.jsonl", "size": 3}},
    "represent": {"job": "represent", "targets": {"a": "one"}, "goals": {"path": "rows.jsonl"},
                  "benign": {"path": "rows.jsonl"}},
    "coordinate": {"job": "coordinate", "policies": ["random"],
                   "application": {"name": "tracking", "agents": 3, "tracks": "rows.jsonl"}},
}  # fmt: skip


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    root = tiny_family(tmp_path_factory.mktemp("world"))
    for name in ("base", "one", "two"):
        (root / name / "large.safetensors.note.txt").write_bytes(bytes(3 * BLOCK))  # beyond what was read whole once
    (root / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "a"}) for i in range(8)))
    (root / "settings.json").write_text("{}")
    (root / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": str(root / "base")}
    (root / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (root / "adapter" / "adapter_model.safetensors").write_bytes(bytes(100))
    return root


@pytest.fixture
def world(kept, tmp_path, monkeypatch):
    folder = shutil.copytree(kept, tmp_path / "world")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "../base"}))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return folder


def identity_now(name):
    return open_run(parse(JOBS[name]), "run", quiet=True, on_change="refuse").hash


def flip(path, position):
    stamp = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))


# What is called like an input, and is none.
NAMES = {"merge-tokenizer": {"base"}}


def test_every_job_is_here():
    assert {parse(recipe).job for recipe in JOBS.values()} == set(registry.job)


def texts_in(value):
    if isinstance(value, dict | list):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in texts_in(item)]
    return [value] if isinstance(value, str) else []


def paths_of(recipe, world):
    """What a recipe names that is there: all of it must be read, the base of an adapter too."""
    found = {text for text in texts_in(recipe) if (world / text).exists()}
    return found | ({"base"} if "adapter" in found else set())


@pytest.mark.parametrize("name", JOBS)
def test_every_byte_of_every_input_is_part_of_it(world, name):
    before = identity_now(name)
    for reference in sorted(paths_of(JOBS[name], world) - NAMES.get(name, set())):
        path = world / reference
        for file in [path] if path.is_file() else sorted(path.iterdir()):
            if file.name == "adapter_config.json":
                continue  # one byte may make it name another base
            middle = file.stat().st_size // 2
            flip(file, middle)
            assert identity_now(name) != before, file
            flip(file, middle)
            assert identity_now(name) == before


@pytest.mark.parametrize("name", JOBS)
def test_nothing_else_is(world, name):
    before = identity_now(name)
    (world / "one" / "optimizer.pt").write_text("x")
    (world / "one" / "trainer_state.json").write_text("{}")
    (world / "one" / "checkpoint-3").mkdir()
    (world / "one" / "checkpoint-3" / "model.safetensors").write_text("x")
    (world / "one" / ".lock").write_text("x")
    (world / "unrelated.jsonl").write_text("x")
    for path in world.rglob("*.safetensors"):
        path.touch()
    assert identity_now(name) == before


def test_the_version_of_the_numerics_is_part_of_it(world, monkeypatch):
    before = execute(parse(JOBS["merge"]), "run", quiet=True)
    assert before.record["numerics"] == record.NUMERICS
    monkeypatch.setattr(record.identity, "__defaults__", (2,))
    monkeypatch.setattr(record, "NUMERICS", 2)
    with pytest.raises(record.CheckpointError, match="this version of modicum computes other numbers"):
        execute(parse(JOBS["merge"]), "run", quiet=True)


def test_what_changed_is_named(world):
    execute(parse(JOBS["merge"]), "run", quiet=True)
    flip(world / "two" / "model.safetensors", 5000)
    with pytest.raises(record.CheckpointError, match="other inputs .input two is not what it was.*Choose another"):
        execute(parse(JOBS["merge"]), "run", quiet=True)
    assert read_record("run")["status"] == "done"


def test_a_chain_of_adapters_is_followed_and_a_circle_ends(world):
    for name, base in (("second", "../adapter"), ("adapter", "../second")):
        (world / name).mkdir(exist_ok=True)
        (world / name / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    assert {Path(name).name for name in look(["second"]).hashes} == {"second", "adapter"}
    (world / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../base"}))
    assert {Path(name).name for name in look(["second"]).hashes} == {"second", "adapter", "base"}


@pytest.mark.parametrize("config", ["{", "[]", '{"base_model_name_or_path": 3}', "[" * 100_000, "\0"])
def test_a_malformed_adapter_is_left_to_whoever_opens_it(world, config):
    (world / "adapter" / "adapter_config.json").write_text(config)
    assert set(look(["adapter"]).hashes) == {"adapter"}


def test_what_is_not_here_is_told_apart_by_its_revision(world, monkeypatch):
    commits = {"org/model": "abc", "org/data": "def"}
    monkeypatch.setattr(references, "hub_commit", lambda name, kind: commits.get(name.partition("@")[0], ""))
    names = ["org/model", "org/model@v1", "dataset:org/data", "builtin:byte-llama", "python==3.11", "./gone", "a/b/c"]
    assert list(look(names).hashes.values()) == [
        "org/model abc", "org/model@v1 abc", "dataset:org/data def", "builtin:byte-llama r1", "python==3.11", "./gone",
        "a/b/c",
    ]  # fmt: skip


def test_offline_the_commit_of_the_last_download_counts(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert references.hub_commit("org/name", "model") == ""
    folder = tmp_path / "models--org--name"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc\n")
    (folder / "snapshots" / "0123").mkdir(parents=True)
    assert references.hub_commit("org/name", "model") == "abc"
    assert references.hub_commit("org/name@0123", "model") == "0123"
    assert references.hub_commit("org/name@v9", "model") == references.hub_commit("../name", "model") == ""


@pytest.mark.parametrize("path", ["reasoning-gym:chain_sum", "builtin:python-stdlib"])
def test_data_that_a_package_brings_is_told_apart_by_its_version(world, path):
    pytest.importorskip("reasoning_gym")
    recipe = parse(JOBS["train"] | {"data": {"path": path, "size": 4}})
    (name,) = set(open_run(recipe, "run", quiet=True, on_change="refuse").inputs.hashes) - {"base"}
    assert name.partition("==")[0] in ("python", "reasoning-gym") and name.partition("==")[2]
