"""A pipeline's other processes wait for the first one: for this recipe, whatever the folder holds of earlier ones."""

import multiprocessing
import os
import time
from pathlib import Path
from typing import Literal

import pytest

from modicum import lock, registry
from modicum.job_facts import JobFacts
from modicum.jobs import execute
from modicum.recipe import Recipe, parse
from modicum.record import Run, read_record
from modicum.registry import Entry

CONTEXT = multiprocessing.get_context("fork")


class WriteRecipe(Recipe):
    job: Literal["write"] = "write"
    value: int
    refuse: str = "nowhere"
    wait: str = "nowhere"


def write(recipe: WriteRecipe, run: Run) -> None:
    """Make a file, fail, or wait, as the files named in the recipe tell."""
    assert run.main
    if Path(recipe.refuse).exists():
        raise RuntimeError("told to fail")
    while Path(recipe.wait).exists():
        time.sleep(0.01)
    (run.folder / "made").write_text(str(recipe.value))
    run.record["metrics"] = {"value": recipe.value}
    run.output("made", run.folder / "made")


@pytest.fixture(autouse=True)
def job(monkeypatch):
    monkeypatch.setitem(registry.job._entries, "write", Entry("job", "write", write, JobFacts()))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")


def pipeline(**stage):
    first = {"name": "first", "job": "write", "value": 0}
    return {"job": "pipeline", "stages": [first, {"name": "second", "job": "write", **stage}]}


def process(rank, data, folder):
    """Start one of the pipeline's processes; what comes of it goes into the queue."""
    queue, wait = CONTEXT.Queue(), lock.wait

    def spy(ready, *place, **settings):
        looks = []

        def look():
            looks.append(1)
            if len(looks) > 1:  # it has looked at the lock by now
                (folder.parent / f"waiting for {Path(place[1]).name}").touch()
            return ready()

        return wait(look, *place, **settings)

    def work():
        os.environ["RANK"] = str(rank)
        lock.wait = spy
        try:
            queue.put(execute(parse(data), folder, quiet=True).record["metrics"]["second"])
        except RuntimeError as error:
            queue.put(str(error))

    started = CONTEXT.Process(target=work)
    started.start()
    return started, queue


def test_another_recipes_record_is_not_taken_for_this_ones(tmp_path):
    execute(parse(pipeline(value=1)), tmp_path / "r", quiet=True)
    follower, told = process(1, pipeline(value=2), tmp_path / "r")
    follower.join(0.5)
    assert follower.is_alive()
    execute(parse(pipeline(value=2)), tmp_path / "r", quiet=True)
    assert told.get(timeout=20) == {"value": 2}
    follower.join()


def test_an_old_failure_is_not_this_ones(tmp_path):
    data = pipeline(value=1, refuse=str(tmp_path / "refuse"))
    (tmp_path / "refuse").touch()
    with pytest.raises(RuntimeError, match="told to fail"):
        execute(parse(data), tmp_path / "r", quiet=True)
    assert read_record(tmp_path / "r" / "stages" / "second")["status"] == "failed"
    (tmp_path / "refuse").unlink()
    follower, told = process(1, data, tmp_path / "r")
    follower.join(0.5)
    assert follower.is_alive()
    execute(parse(data), tmp_path / "r", quiet=True)
    assert told.get(timeout=20) == {"value": 1}
    follower.join()


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_nobody_waits_for_a_first_process_that_ended(tmp_path, end):
    held, refuse = tmp_path / "held", tmp_path / "refuse"
    held.touch()
    data = pipeline(value=1, wait=str(held))
    data["stages"].append({"name": "third", "job": "write", "value": 2, "refuse": str(refuse)})
    first, _ = process(0, data, tmp_path / "r")
    follower, told = process(1, data, tmp_path / "r")
    while not (tmp_path / "waiting for second").exists():
        time.sleep(0.01)
    if end == "killed":
        first.kill()
    else:
        refuse.touch()
        held.unlink()
    name = "second" if end == "killed" else "third"
    assert told.get(timeout=20) == (
        f"The first process ended before it finished {tmp_path}/r/stages/{name}. Its own messages tell why."
    )
    first.join()
    follower.join()
