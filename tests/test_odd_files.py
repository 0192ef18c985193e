"""Records, locks, logs, names and factors that nobody writes: one line, and nothing is done to anybody's process."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from modicum import layout, lock, stored
from modicum.errors import CheckpointError, RecipeError
from modicum.recipe import parse
from modicum.record import Run
from modicum.weights import Checkpoint
from modicum.weights.files import Spec
from modicum.weights.stream import map_tensors


@pytest.mark.parametrize(
    "change",
    [{"status": None}, {"job": None}, {"seconds": "x"}, {"seconds": None}, {"seconds": True}, {"seconds": math.nan}],
)
def test_records_hold_what_a_run_goes_on_from_or_are_refused(tmp_path, change):
    whole = {"job": "merge", "status": "failed", "seconds": 1} | change
    if "seconds" not in change:
        whole = {key: value for key, value in whole.items() if value is not None}
    (tmp_path / "record.json").write_text(json.dumps(whole))
    with pytest.raises(CheckpointError, match="Delete the folder and run again"):
        Run(tmp_path, job="merge", recipe={})


def test_a_run_goes_on_from_a_record_that_lacks_what_can_be_empty(tmp_path):
    new = Run(tmp_path / "new", job="merge", recipe={"job": "merge"})
    (tmp_path / "record.json").write_text(json.dumps({"job": "merge", "status": "failed", "hash": new.hash}))
    with Run(tmp_path, job="merge", recipe={"job": "merge"}, quiet=True) as run:
        run.note("it goes on")
    assert stored.read_record(tmp_path)["notes"] == ["it goes on"]


@pytest.mark.parametrize("pid", [10**30, 2**31, "x", None, 1.5, [1], True, -1, 0])
def test_a_lock_names_one_process_or_is_none(tmp_path, pid, monkeypatch):
    monkeypatch.setattr(lock.time, "sleep", lambda _: None)
    monkeypatch.setattr(lock.os, "kill", lambda *_: pytest.fail("a signal was sent"))
    (tmp_path / ".lock").write_text(json.dumps(asdict(lock._me()) | {"pid": pid}))
    with pytest.raises(CheckpointError, match="no lock file that can be read"), lock.hold(tmp_path / ".lock", "it"):
        pass


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    lines = [{"trial": 0, "value": 1}, {"value": 1}, {"trial": "0", "value": 1}, {"trial": 1, "value": None}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"event": "trial"} | line) + "\n" for line in lines))
    assert [line["trial"] for line in stored.read_log(tmp_path, "trial", trial=int, value=float)] == [0]


@pytest.mark.parametrize("recipe", [{"job": "merge", "experts": ["a\udce9"]}, {"job": "merge", "\ud800": 1}])
def test_half_characters_are_no_recipe(recipe):
    with pytest.raises(RecipeError, match="is no text in UTF-8"):
        parse(recipe)


def test_a_companion_whose_name_is_no_text_is_refused_before_the_merge(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.json")).write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not UTF-8"):
        Checkpoint(tmp_path).companions()


def test_an_unfinished_result_of_any_bytes_is_begun_again(tmp_path):
    beside = tmp_path / ".out.partial"
    beside.mkdir()
    (beside / "key").write_bytes(b"\xff\xfe")
    specs = {"w": Spec((2,), torch.float32)}
    map_tensors(lambda _: (torch.ones(2), {}), specs, tmp_path / "out", identity="x", workers=1)
    assert (tmp_path / "out/model.safetensors").exists()


def test_files_without_tensors_and_factors_without_rank_are_refused(tmp_path):
    save_file({}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        Checkpoint(tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder, tensors in (
        (base, {"q.weight": torch.ones(4, 4)}),
        (adapter, {"q.lora_A.weight": torch.ones(0, 4), "q.lora_B.weight": torch.ones(4, 0)}),
    ):
        folder.mkdir()
        save_file(tensors, folder / ("model.safetensors" if folder == base else "adapter_model.safetensors"))
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 0, "target_modules": ["q"]}))
    with pytest.raises(CheckpointError, match="r of at least 1"):
        Checkpoint(adapter, base=base)


def test_names_with_numbers_of_any_kind_have_an_order():
    names = ["h.10", "h.9", "h.²", "h." + "9" * 5000, "h.010"]
    assert sorted(names, key=layout.natural)[:2] == ["h.9", "h.10"]
    assert [layout.layer_of(f"layers.{part}.w") is None for part in ("1", "²", "9" * 5000)] == [False, True, True]
