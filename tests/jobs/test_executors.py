"""Stages run side by side, none twice, and go on when a process is killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import wait
from pathlib import Path

import pytest
import yaml

from modicum import registry
from modicum.errors import MissingExtraError, ModicumError, RecipeError, UnsupportedError
from modicum.jobs import execute
from modicum.jobs.executors import DONE, Task, answered, opened, perform
from modicum.recipe import parse
from modicum.record import read_log, read_record
from waiting import ENTRY, know_the_job, lines, together


@pytest.fixture(autouse=True)
def _known_everywhere(tmp_path, monkeypatch):
    monkeypatch.setitem(registry.job._entries, "wait", ENTRY)
    for name, value in know_the_job(tmp_path / "site").items():
        monkeypatch.setenv(name, value)


def grid(tmp_path, *, cells=4, **stage):
    log = str(tmp_path / "log")
    return {
        "job": "grid",
        "axes": {"value": {"value": list(range(cells))}},
        "stages": [
            {"name": "first", "over": ["value"], "job": "wait", "log": log, **stage},
            {"name": "last", "job": "wait", "log": log, "after": ["stage:first"], "value": 99},
        ],
    }


def begun(tmp_path):
    """Return how often each cell was begun."""
    found = [cell for what, cell, _ in lines(tmp_path / "log") if what == "begins"]
    return {cell: found.count(cell) for cell in found}


def start(tmp_path, data, *options):
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "modicum", "run", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "g")]
    with (tmp_path / "told").open("a") as told:
        return subprocess.Popen([*command, *options], stderr=told)


def test_two_workers_run_cells_side_by_side_and_keep_the_order(tmp_path):
    run = execute(parse(grid(tmp_path, seconds=0.3)), tmp_path / "g", quiet=True, workers=2)
    assert set(begun(tmp_path).values()) == {1}
    noted = lines(tmp_path / "log")
    assert noted[-2:] == [("begins", "99/0", noted[-1][2]), ("ends", "99/0", noted[-1][2])]
    assert len({process for _, _, process in noted}) == 2 and str(os.getpid()) not in {p for _, _, p in noted}
    assert (run.folder / "stages").is_dir() and len(json.loads((run.folder / "grid.json").read_text())["cells"]) == 5


def test_cells_of_an_earlier_form_are_not_shown_and_not_done_again(tmp_path):
    def shown(folder):
        names = {file.stem for file in (folder / "cells").iterdir()}
        assert names == {cell["cell"] for cell in json.loads((folder / "grid.json").read_text())["cells"]}
        return names

    whole = shown(execute(parse(grid(tmp_path, cells=3)), tmp_path / "g", quiet=True, workers=1).folder)
    less = shown(execute(parse(grid(tmp_path, cells=2)), tmp_path / "g", quiet=True, workers=1).folder)
    assert len(whole) == 4 and len(less) == 3 and len(less - whole) == 1  # the last one sums up others
    assert shown(execute(parse(grid(tmp_path, cells=3)), tmp_path / "g", quiet=True, workers=1).folder) == whole
    assert begun(tmp_path) == {"0/0": 1, "1/0": 1, "2/0": 1, "99/0": 2}


def test_a_killed_worker_costs_one_cell(tmp_path):
    data = grid(tmp_path, seconds=0.2)
    data["axes"]["value"] = {"a": {"value": 1, "kill": str(tmp_path / "killed")}, "b": {"value": 2}, "c": {"value": 3}}
    execute(parse(data), tmp_path / "g", quiet=True, workers=2)
    assert begun(tmp_path) == {"1/0": 2, "2/0": 1, "3/0": 1, "99/0": 1}


def test_a_cell_that_kills_every_process_is_given_up(tmp_path):
    data = grid(tmp_path, cells=2, kill="/proc/self/no such file")
    with pytest.raises(RuntimeError, match="ended without a word"):
        execute(parse(data), tmp_path / "g", quiet=True, workers=2)


def held(tmp_path, processes):
    """Wait until so many processes have begun a cell."""
    deadline = time.monotonic() + 100
    while not (tmp_path / "log").exists() or len({process for _, _, process in lines(tmp_path / "log")}) < processes:
        assert time.monotonic() < deadline, (tmp_path / "told").read_text()
        time.sleep(0.02)


def test_two_processes_share_a_grid(tmp_path, tiny_model):
    (tmp_path / "hold").touch()
    data = grid(tmp_path, cells=6, hold=str(tmp_path / "hold"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(8)))
    tune = {"name": "tune", "job": "train", "model": str(tiny_model), "data": {"path": str(tmp_path / "rows.jsonl")}}
    tune["trainer"] = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "save_steps": 1}
    data["stages"].insert(1, tune)
    heads = [start(tmp_path, data, "--workers", "1") for _ in range(2)]
    held(tmp_path, 2)
    (tmp_path / "hold").unlink()
    assert [head.wait(timeout=120) for head in heads] == [0, 0], (tmp_path / "told").read_text()
    assert set(begun(tmp_path).values()) == {1} and together(tmp_path / "log") == 2
    assert read_record(tmp_path / "g")["status"] == "done"
    assert len(json.loads((tmp_path / "g" / "grid.json").read_text())["cells"]) == 8
    (trained,) = (tmp_path / "g").glob("stages/tune-*")
    assert [line["step"] for line in read_log(trained, "train")] == [1, 2, 3]  # by one of them, once


def test_a_killed_head_costs_the_cells_at_work_and_the_other_process_ends_the_grid(tmp_path):
    (tmp_path / "hold").touch()
    data = grid(tmp_path, cells=4, hold=str(tmp_path / "hold"))
    first = start(tmp_path, data, "--workers", "1")
    held(tmp_path, 1)
    with pytest.raises(ModicumError, match="is being written by process"):  # another grid in the same folder
        execute(parse(grid(tmp_path, cells=2)), tmp_path / "g", quiet=True, workers=1)
    second = start(tmp_path, data, "--workers", "1")
    held(tmp_path, 2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path / "hold").unlink()
    assert second.wait(timeout=120) == 0
    assert sorted(begun(tmp_path).values()) == [1, 1, 1, 1, 2]
    assert read_record(tmp_path / "g")["status"] == "done"


@pytest.mark.slow
def test_ten_kills_of_the_head_change_no_byte(tmp_path):
    def content(folder):
        files = [file for kind in ("cells/*", "grid.json", "stages/*/made") for file in folder.glob(kind)]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}

    data = grid(tmp_path, cells=24, seconds=0.05)
    whole = content(execute(parse(data), tmp_path / "whole", quiet=True, workers=1).folder)
    (tmp_path / "log").unlink()
    draw = random.Random(0)
    for _ in range(10):
        seen = len(lines(tmp_path / "log")) if (tmp_path / "log").exists() else 0
        head, wanted = start(tmp_path, data, "--workers", "1", "--quiet"), seen + draw.randint(1, 4)
        while not (tmp_path / "log").exists() or len(lines(tmp_path / "log")) < wanted:
            assert head.poll() is None
            time.sleep(0.002)
        time.sleep(0.02 * draw.random())
        head.kill()
        head.wait()
    assert start(tmp_path, data, "--workers", "1", "--quiet").wait() == 0
    assert content(tmp_path / "g") == whole and len(whole) == 24 + 1 + 25 + 1
    counts = begun(tmp_path).values()
    assert sum(counts) <= 25 + 10  # a kill costs the cell at work


def test_a_cell_that_is_refused_stops_what_uses_it_and_nothing_else(tmp_path):
    data = grid(tmp_path)
    data["axes"]["value"] = {"bad": {"value": 1, "refuse": True}, "good": {"value": 2}}
    with pytest.raises(ModicumError, match="first bad seed 0: told to refuse"):
        execute(parse(data), tmp_path / "g", quiet=True, workers=2)
    assert begun(tmp_path) == {"1/0": 1, "2/0": 1}
    record = read_record(tmp_path / "g")
    assert record["status"] == "failed" and [stage["name"] for stage in record["stages"]] == ["first good seed 0"]


def test_independent_stages_of_a_pipeline_run_side_by_side(tmp_path):
    log = str(tmp_path / "log")
    stages = [{"name": f"s{i}", "job": "wait", "log": log, "value": i, "seconds": 0.3} for i in range(2)]
    stages.append({"name": "end", "job": "wait", "log": log, "value": 9, "after": ["stage:s0", "stage:s1"]})
    data = {"job": "pipeline", "stages": stages}
    run = execute(parse(data), tmp_path / "p", quiet=True, workers=2)
    assert begun(tmp_path) == {"0/0": 1, "1/0": 1, "9/0": 1}
    assert [stage["name"] for stage in run.record["stages"]] == ["s0", "s1", "end"]
    again = execute(parse(data), tmp_path / "p", quiet=True)  # one by one, in this process
    assert again.done and set(begun(tmp_path).values()) == {1}


def test_executors_are_refused_where_they_cannot_work(tmp_path, monkeypatch):
    data = grid(tmp_path)
    with pytest.raises(RecipeError, match="no executor 'rya'. Did you mean 'ray'"):
        execute(parse(data), tmp_path / "g", quiet=True, on="rya")
    with pytest.raises(RecipeError, match="--workers 0"):
        execute(parse(data), tmp_path / "g", quiet=True, workers=0)
    with pytest.raises(RecipeError, match="a wait has none"):
        execute(parse({"job": "wait", "log": str(tmp_path / "log")}), tmp_path / "w", quiet=True, workers=2)
    for package, name in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=r"modicum\[cluster\]"):
            execute(parse(data), tmp_path / "g", quiet=True, on=name)
    assert not (tmp_path / "g").exists()


def test_slurm_needs_a_machine_that_submits(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match="There is no sbatch"):
        execute(parse(grid(tmp_path)), tmp_path / "g", quiet=True, on="slurm")


@pytest.mark.parametrize("engine", ["ray", "slurm"])
def test_clusters_run_every_cell_once(tmp_path, monkeypatch, engine):
    pytest.importorskip({"ray": "ray", "slurm": "submitit"}[engine])
    monkeypatch.setenv("MODICUM_SLURM", "local")
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    data = grid(tmp_path, cells=3, seconds=0.5)
    data["axes"]["value"] = {"a": {"value": 1, "kill": str(tmp_path / "killed")}, "b": {"value": 2}, "c": {"value": 3}}
    head = start(tmp_path, data, "--on", engine, "--workers", "2")
    assert head.wait(timeout=180) == 0, (tmp_path / "told").read_text()
    assert begun(tmp_path) == {"1/0": 2, "2/0": 1, "3/0": 1, "99/0": 1}


def test_tasks_and_answers_travel_as_text(tmp_path):
    task = Task("a", {"job": "wait", "log": str(tmp_path / "log"), "seed": 0}, tmp_path / "a", tmp_path)
    assert Task.load(task.dump()) == task
    assert perform(task) == DONE and answered(json.dumps({"told": DONE})) == DONE
    with pytest.raises(ModicumError, match="one\ntwo"):
        answered(json.dumps({"refused": "one\ntwo"}))
    with opened(None, 3, most=8) as pool:
        assert pool.slots == 3
        futures = [pool.submit(Task(str(i), {**task.recipe, "value": i}, tmp_path / str(i))) for i in range(3)]
        wait(futures)
        assert [future.result() for future in futures] == [DONE] * 3
    assert Path(tmp_path / "0" / "made").exists()
