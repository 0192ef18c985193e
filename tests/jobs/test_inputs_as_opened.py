"""What a job opens is what its run is known by: an input that changes in between is one line, and nothing is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from modicum import jobs
from modicum.cells import fill
from modicum.errors import CheckpointError
from modicum.evaluate.chat import ChatRequest, user
from modicum.jobs.chat.cache import Cached
from modicum.jobs.chat.scripted import Scripted
from modicum.recipe import parse
from modicum.weights.journal import Journal
from support import tiny_family

DATA = {"path": "rows.jsonl", "max_length": 32}
TASKS = {"say": {"kind": "perplexity", "data": DATA}}
GOALS = {"goals": {"path": "bad.jsonl"}, "benign": {"path": "rows.jsonl"}}
RECIPES = {
    "merge": {"job": "merge", "base": "base", "experts": ["one", "two"], "method": "task_arithmetic"},
    "average": {"job": "average", "checkpoints": ["one", "two"],
                "method": {"name": "sewa", "k": 1, "iters": 2}, "data": DATA},
    "extract": {"job": "extract", "model": "one", "base": "base"},
    "transplant": {"job": "transplant", "model": "one", "donor": "two"},
    "moe": {"base_model": "base", "gate_mode": "random",
            "experts": [{"source_model": "one"}, {"source_model": "two"}]},
    "route": {"job": "route", "base": "base", "experts": {"a": "one", "b": "two"}, "rule": "all", "store": "sign",
              "router": None},
    "search": {"job": "search", "merge": {"base": "base", "experts": ["one"], "method": "task_arithmetic"},
               "knobs": {"scale": {"low": 0.1, "high": 1}}, "tasks": TASKS, "trials": 1},
    "represent": {"job": "represent", "targets": {"a": "one"}, "folds": 2, **GOALS},
    "coordinate": {"job": "coordinate", "policies": ["random"], "rounds": 2, "seeds": 1, "frames": 0,
                   "application": {"name": "tracking", "agents": 2, "tracks": "tracks.csv"}},
}  # fmt: skip
CASES = [
    *((name, f"{model}/model.safetensors") for name in ("merge", "route", "moe") for model in ("base", "one", "two")),
    *(("average", file) for file in ("one/model.safetensors", "two/model.safetensors", "rows.jsonl")),
    *(("extract", f"{model}/model.safetensors") for model in ("base", "one")),
    *(("transplant", f"{model}/{file}") for model in ("one", "two") for file in ("model.safetensors", "config.json")),
    *(("search", file) for file in ("base/model.safetensors", "one/model.safetensors", "rows.jsonl")),
    *(("represent", file) for file in ("one/model.safetensors", "rows.jsonl", "bad.jsonl")),
    ("coordinate", "tracks.csv"),
]


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    root = tiny_family(tmp_path_factory.mktemp("world"))
    for name in ("rows", "bad"):
        rows = ({"prompt": f"{name} say {i}", "completion": "a"} for i in range(4))
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reports = [f"{time},{name},{time + place},{place}" for time in range(0, 50, 10) for place, name in enumerate("ab")]
    (root / "tracks.csv").write_text("\n".join(["time,id,x,y", *reports]) + "\n")
    return root


@pytest.fixture
def world(kept, tmp_path, monkeypatch):
    folder = shutil.copytree(kept, tmp_path / "world")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return folder


def change(path):
    """Write another content of the same kind into the same file."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = content[:-1] + bytes([content[-1] ^ 1])
    elif path.suffix == ".csv":
        content = content.replace(b",41,1", b",42,1")
    else:
        content = content.replace(b"say 3", b"say 9") if b"say 3" in content else content + b" "
    assert content != path.read_bytes()
    path.write_bytes(content)


@pytest.mark.parametrize(("name", "file"), CASES)
def test_an_input_that_changes_before_it_is_opened(world, monkeypatch, name, file):
    opened = jobs.open_run

    def late(*args, **options):
        run = opened(*args, **options)
        change(Path(file))
        return run

    monkeypatch.setattr(jobs, "open_run", late)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        jobs.execute(parse(RECIPES[name]), "run", quiet=True)
    assert not Path("run", "model").exists()
    assert not [path for path in Path().glob("run/*.jsonl") if len(path.read_text().splitlines()) > 1]
    assert not [*Path().glob("run/cells*"), *Path().glob("run/choice.json")]


def refuse():
    raise CheckpointError("one changed while it was read")


def test_no_cell_is_stored_of_changed_inputs():
    store = {}
    with pytest.raises(CheckpointError, match="changed"):
        fill(store, {"a": lambda: {"value": 1}}, check=refuse)
    assert not store


def test_no_answer_is_kept_of_changed_inputs(tmp_path):
    asked = Cached(Scripted(lambda _: "yes"), tmp_path / "cache.jsonl", check=refuse)
    with pytest.raises(CheckpointError, match="changed"):
        asked.generate([ChatRequest(user("hi"))])
    journal = Journal(tmp_path / "search.jsonl", "x", check=refuse)
    with pytest.raises(CheckpointError, match="changed"):
        journal.answer("a", lambda: [1.0])
    assert len((tmp_path / "search.jsonl").read_text().splitlines()) == 1
    assert not (tmp_path / "cache.jsonl").exists()
