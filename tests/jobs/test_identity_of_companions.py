"""What a run depends on beside the files that its recipe names: companions, code, the bases of adapters."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from modicum.jobs import open_run
from modicum.jobs.data import scoring_models
from modicum.jobs.data.section import ScorerSection
from modicum.recipe import parse
from support import byte_tokenizer, tiny_llama

TRAIN = {"job": "train", "model": "base", "data": {"path": "rows.jsonl"}}
PAIRS = {"path": "pairs.jsonl"}
SCORED = {"mix": {"parts": {"a": PAIRS, "b": PAIRS}, "filter": {"scorer": {"function": "my_reward:score"}}}}
NEEDLE = {"kind": "retrieval", "suite": "needle", "tokenizer": "base", "data": {"path": "rows.jsonl"}}
MERGE = {"job": "merge", "base": "base", "experts": ["base/model.safetensors"], "method": "linear"}
HARNESS = {"job": "evaluate", "models": {"a": "base"},
           "tasks": {"h": {"kind": "lm_eval", "task": "sums", "data": "harness/tasks"}}}  # fmt: skip
DEFINITIONS = {
    "tasks/sums.yaml": "task: sums\ninclude: ../shared/base.yaml\nmetric_list: [{metric: acc}]\n",
    "tasks/other.yaml": "task: other\ndataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\n",
    "tasks/broken.yaml": "task: [\n",
    "shared/base.yaml": "dataset_path: json\ndataset_kwargs: {data_files: {test: harness/questions.jsonl}}\n"
    "process_results: !function marks.right\n",
    "shared/marks.py": "def right(doc, results):\n    return {'acc': 1.0}\n",
    "questions.jsonl": '{"prompt": "1 + 1 ="}\n',
}
CASES = {
    "a configuration beside weights": (MERGE, "base/config.json"),
    "a tokenizer beside weights": (MERGE | {"base": "base/model.safetensors"}, "base/tokenizer_config.json"),
    "a chat template in a folder": (TRAIN, "base/additional_chat_templates/tools.jinja"),
    "rows in a folder that looks like a model": (TRAIN | {"data": {"path": "data"}}, "data/train/0.jsonl"),
    "rows called like a trainer's state": (TRAIN | {"data": {"path": "data"}}, "data/optimizer_rows.jsonl"),
    "files of a loader": (
        TRAIN | {"data": {"path": "json", "config": {"data_files": {"train": ["data/train/*.jsonl"]}}}},
        "data/train/0.jsonl",
    ),
    "files of a loader in its folder": (
        TRAIN | {"data": {"path": "json", "config": {"data_dir": "data/train", "data_files": "0.jsonl"}}},
        "data/train/0.jsonl",
    ),
    "a loader's folder": (
        TRAIN | {"data": {"path": "json", "config": {"data_dir": "data/train"}}},
        "data/train/0.jsonl",
    ),
    "a module on the path": (TRAIN | {"data": SCORED, "objective": "dpo"}, "my_reward.py"),
    "a tokenizer that counts": ({"job": "evaluate", "models": {"a": "base"}, "tasks": {"r": NEEDLE}},
                                "base/tokenizer_config.json"),
} | {
    f"{kind} of a task of the harness": (HARNESS, file)
    for kind, file in {"the definition": "harness/tasks/sums.yaml", "the data": "harness/questions.jsonl",
                       "an included file": "harness/shared/base.yaml", "code": "harness/shared/marks.py"}.items()
}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    tiny_llama(seed=0).save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "base/additional_chat_templates").mkdir()
    (tmp_path / "base/additional_chat_templates/tools.jinja").write_text("{{ messages }}")
    rows = "".join(json.dumps({"prompt": f"say {i}", "completion": "abc"}) + "\n" for i in range(8))
    (tmp_path / "data/train").mkdir(parents=True)
    for name in ("rows.jsonl", "data/train/0.jsonl", "data/optimizer_rows.jsonl"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "data/config.json").write_text("{}")
    pairs = [{"prompt": f"say {i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    for name, text in DEFINITIONS.items():
        (tmp_path / "harness" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "harness" / name).write_text(text)
    (tmp_path / "my_reward.py").write_text("def score(prompt, answer):\n    return [1.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def identity(recipe):
    return open_run(parse(recipe), "run", quiet=True, on_change="refuse").hash


@pytest.mark.parametrize("name", CASES)
def test_what_is_read_beside_the_named_files_is_part_of_a_run(world, name):
    recipe, file = CASES[name]
    before = identity(recipe)
    assert identity(recipe) == before
    Path(file).write_text(Path(file).read_text() + " ")
    assert identity(recipe) != before


def test_compiled_code_of_a_module_is_no_part_of_it(world, monkeypatch):
    (world / "rewards").mkdir()
    (world / "rewards/__init__.py").write_text("def score(prompt, answer):\n    return [1.0]\n")
    data = json.loads(json.dumps(SCORED).replace("my_reward", "rewards"))
    recipe = TRAIN | {"data": data, "objective": "dpo"}
    before = identity(recipe)
    (world / "rewards/__pycache__").mkdir()
    (world / "rewards/__pycache__/a.pyc").write_text("x")
    assert identity(recipe) == before
    (world / "rewards/deep.py").write_text("x = 1")
    assert identity(recipe) != before


def test_the_version_of_what_brings_data_or_code_is_part_of_a_run(world):
    def names(recipe):
        return set(open_run(parse(recipe), "run", quiet=True, on_change="refuse").inputs.hashes)

    packages = {"name": "selection", "packages": ["json", "email"]}
    played = {"job": "coordinate", "policies": ["random"], "application": packages}
    assert names(played) == {f"python=={sys.version.split()[0]}"}
    data = json.loads(json.dumps(SCORED).replace("my_reward", "pytest"))
    assert any(name.startswith("pytest==") for name in names(TRAIN | {"data": data, "objective": "dpo"}))


def test_goals_of_the_hub_are_known_as_data(world):
    attack = {
        "job": "attack",
        "targets": {"a": "base"},
        "goals": {"path": "org/name"},
        "benign": {"path": "rows.jsonl"},
    }
    assert {"dataset:org/name", "rows.jsonl"} <= set(parse(attack).inputs())


def test_scores_of_an_adapter_are_those_of_its_base(world, monkeypatch):
    (world / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "../base"}
    (world / "adapter/adapter_config.json").write_text(json.dumps(config))
    asked, calls = [({"prompt": "p"}, "a")], []
    section = ScorerSection(model="adapter")
    classifier = scoring_models.Classifier(section)
    monkeypatch.setattr(classifier, "_scores", lambda *_: calls.append(1) or [[float(len(calls))]])
    assert classifier(asked) == classifier(asked) == [[1.0]]
    weights = world / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert classifier(asked) == [[2.0]]


@pytest.mark.parametrize("text", ['[["a"]]', "[[null]]", "[1]", "[" * 100_000, '{"a": 1}', "[[NaN]]", "\0"])
def test_a_damaged_memory_of_scores_is_computed_again(world, monkeypatch, text):
    asked = [({"prompt": "p"}, "a")]
    classifier = scoring_models.Classifier(ScorerSection(model="base"))
    monkeypatch.setattr(classifier, "_scores", lambda *_: [[1.0]])
    classifier(asked)
    (file,) = (world / "cache/scores").glob("*.json")
    file.write_text(text)
    assert classifier(asked) == [[1.0]]


def test_folders_of_data_are_read_as_before(world):
    from modicum.jobs.data.rows import load_rows
    from modicum.jobs.data.section import DataSection

    shutil.rmtree(world / "base")
    (world / "data/config.json").unlink()
    assert len(load_rows(DataSection(path="data"))) == 16
