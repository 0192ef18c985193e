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
from modicum.credentials import HIDDEN
from modicum.errors import CheckpointError, RecipeError
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.sources import local
from modicum.recipe import parse
from modicum.record import ASIDE, Run, read_record
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


def test_a_lock_that_leads_nowhere_is_no_lock(tmp_path, monkeypatch):
    """It is there for whoever makes the lock, and not for whoever reads it, who both tried without an end."""
    monkeypatch.setattr(lock.time, "sleep", lambda _: None)
    (tmp_path / ".lock").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="no lock file that can be read"), lock.hold(tmp_path / ".lock", "it"):
        pass


def test_damaged_lines_of_a_log_are_left_out(tmp_path):
    lines = [{"trial": 0, "value": 1}, {"value": 1}, {"trial": "0", "value": 1}, {"trial": 1, "value": None}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps({"event": "trial"} | line) + "\n" for line in lines))
    assert [line["trial"] for line in stored.read_log(tmp_path, "trial", trial=int, value=float)] == [0]


@pytest.mark.parametrize("last", ['{"event": "b", "n": 1', "{", '{"event": "b", "n": 1}'])
def test_what_is_logged_after_a_cut_line_is_a_line_of_its_own(tmp_path, last):
    whole = {"job": "merge", "recipe": {"job": "merge"}, "quiet": True}
    with pytest.raises(KeyError), Run(tmp_path / "run", **whole) as run:
        run.log("b", n=0)
        raise KeyError  # as a full disk would
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(last)
    with Run(tmp_path / "run", **whole) as run:
        run.log("b", n=2)
    lines = [line["n"] for line in stored.read_log(run.folder, "b")]
    assert lines == ([0, 1, 2] if last.endswith("}") else [0, 2])
    assert all(map(json.loads, (run.folder / "log.jsonl").read_text().splitlines()))


def test_half_characters_in_what_a_run_says_are_kept_as_escapes(tmp_path):
    with Run(tmp_path, job="merge", recipe={}, quiet=True) as run:
        run.record["notes"] = ["\ud800"]
    assert stored.read_record(tmp_path)["notes"] == ["\ud800"]


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
    prefix = "base_model.model.q"
    for folder, tensors in (
        (base, {"q.weight": torch.ones(4, 4)}),
        (adapter, {f"{prefix}.lora_A.weight": torch.ones(0, 4), f"{prefix}.lora_B.weight": torch.ones(4, 0)}),
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


def made(folder, text="{}"):
    """A run that made a model of two files."""
    with Run(folder, job="merge", recipe={"job": "merge"}, quiet=True) as run:
        (folder / "model").mkdir(exist_ok=True)
        (folder / "model/config.json").write_text(text)
        (folder / "model/model.safetensors").write_text("x")
        run.output("model", folder / "model")
    return folder


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00001-of-00001.safetensors", "x.bin"])
def test_weights_that_were_added_are_damage_and_set_aside(tmp_path, name):
    run = made(tmp_path / "run")
    (run / "model/notes.txt").write_text("mine")
    assert not stored.damage(run)
    (run / "model" / name).write_text("{}")
    assert stored.damage(run) == stored.verify(run).damaged == {f"model/{name}": "was added"}
    made(run)
    assert not stored.damage(run) and (run / ASIDE / "model" / name).read_text() == "{}"


def test_what_was_set_aside_before_is_kept(tmp_path):
    run = made(tmp_path / "run")
    for text in ("first", "second", "third"):
        (run / "model/config.json").write_text(text)
        made(run)
    kept = [run / ASIDE / place / "model/config.json" for place in (".", "2", "3")]
    assert [path.read_text() for path in kept] == ["first", "second", "third"]


@pytest.mark.parametrize("change", [{"outputs": {"model": "../one"}}, {"outputs": {"model": "/etc"}},
                                    {"stages": [{"folder": "../../x"}]}])  # fmt: skip
def test_a_record_that_points_outside_is_refused(tmp_path, change):
    run = made(tmp_path / "run")
    (run / "record.json").write_text(json.dumps(read_record(run) | change))
    for read in (stored.verify, stored.damage, read_record):
        with pytest.raises(CheckpointError, match="points outside its folder"):
            read(run)


@pytest.mark.parametrize("lost", ["files", "status"])
def test_a_stage_whose_record_says_nothing_is_damage(tmp_path, lost):
    run = made(tmp_path / "run")
    stage = made(run / "stages/a")
    (run / "record.json").write_text(json.dumps(read_record(run) | {"stages": [{"folder": "stages/a"}]}))
    assert not stored.damage(run)
    record = read_record(stage) | ({"status": "failed"} if lost == "status" else {})
    (stage / "record.json").write_text(json.dumps({key: value for key, value in record.items() if key != lost or
                                                   lost == "status"}))  # fmt: skip
    assert stored.damage(run) == {"stages/a/record.json": "does not say what was made"}


def test_what_a_run_logs_and_says_holds_no_key(tmp_path, capsys):
    key = "hf_" + "a" * 30
    with Run(tmp_path / "run", job="merge", recipe={"job": "merge"}) as run:
        run.log("x", told=[f"with {key}"], bits_per_token=1.5)
        run.say(f"with {key}")
    (line,) = stored.read_log(tmp_path / "run")
    assert line["told"] == [f"with {HIDDEN}"] and line["bits_per_token"] == 1.5
    assert f"with {HIDDEN}" in capsys.readouterr().err


def test_a_line_without_end_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "LONGEST", 100)
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a\xc2\x85b"}\r\n\n' + b'{"text": "c"}')
    assert local.local(DataSection(path=str(file)), str(file)) == [{"text": "a\x85b"}, {"text": "c"}]
    with file.open("wb") as opened:
        opened.write(b'{"text": "c"}\n')
        opened.truncate(1 << 36)  # more than any memory
    with pytest.raises(CheckpointError, match="line 2 has more than"):
        local.local(DataSection(path=str(file)), str(file))
    for name in ("rows.json", "text.txt"):
        file.rename(tmp_path / name)
        with pytest.raises(CheckpointError, match="has 68719 MB, more than 268"):
            local.local(DataSection(path=str(tmp_path / name)), str(tmp_path / name))
        file = tmp_path / name
