"""A run and its inputs lie apart, and rows are those of the bytes that are there now."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from modicum.errors import CheckpointError
from modicum.jobs import execute, open_run, plan
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.section import DataSection
from modicum.recipe import parse
from support import byte_tokenizer, tiny_llama

ROWS = "".join(json.dumps({"prompt": f"say {i}", "completion": "abc"}) + "\n" for i in range(4))


@pytest.fixture
def world(tmp_path, monkeypatch):
    for name in ("base", "run/checkpoint-1", "run/checkpoint-2"):
        tiny_llama(seed=len(name)).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/train/rows.jsonl").write_text(ROWS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


@pytest.mark.parametrize("out", ["data/run", "data/train/run", "./data/../data/run", "link/run"])
def test_a_run_in_its_own_data_is_refused(world, out):
    Path("link").symlink_to("data")
    recipe = parse({"job": "statistics", "model": "base", "kind": "fisher", "data": {"path": "data"}})
    for attempt in (execute, plan):
        with pytest.raises(CheckpointError, match=r"lies in data, whose files are all read.*Choose another --out"):
            attempt(recipe, Path(out))
    assert not Path("data/run").exists() and not Path("data/train/run").exists()


def test_a_run_that_holds_its_input_is_refused(world):
    recipe = parse({"job": "average", "checkpoints": ["run/checkpoint-1", "run/checkpoint-2"]})
    with pytest.raises(CheckpointError, match="The input run/checkpoint-1 lies in run, which this run would write"):
        execute(recipe, "run", quiet=True)
    assert Path("run/checkpoint-1/model.safetensors").is_file()


def test_a_run_beside_a_model_or_in_its_folder_is_none_of_it(world):
    recipe = parse({"job": "statistics", "model": "base", "kind": "fisher", "data": {"path": "data"}})
    for out in ("base/statistics", "data-run"):
        before = open_run(recipe, out, quiet=True, on_change="refuse").hash
        Path(out).mkdir()
        assert open_run(recipe, out, quiet=True, on_change="refuse").hash == before


def test_rows_of_a_loader_are_read_anew(world):
    section = DataSection(path="json", config={"data_files": "data/train/rows.jsonl"})
    assert load_rows(section).rows[0]["completion"] == "abc"
    path = Path("data/train/rows.jsonl")
    stamp = path.stat()
    path.write_text(ROWS.replace("abc", "xyz"))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert load_rows(section).rows[0]["completion"] == "xyz"
