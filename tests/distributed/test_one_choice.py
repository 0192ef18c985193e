"""Two processes of a launch work in one folder: whatever the first has done by then, the second chooses the same."""

import sys
import threading
from typing import Literal

import pytest

from modicum import lock, processes, registry
from modicum.durable import commit
from modicum.job_facts import JobFacts
from modicum.jobs import execute
from modicum.recipe import Recipe, parse
from modicum.record import Run
from modicum.registry import Entry

LOOKS = {"open", "os.listdir", "os.scandir", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link"}
HERE = threading.local()  # which process a thread stands for, and what it does at which look at the disk


def look(event, _values):
    """Do what is to be done right before a thread looks at the disk or changes it for the n-th time."""
    if event in LOOKS and getattr(HERE, "then", None) is not None:
        HERE.left -= 1
        if HERE.left < 0:
            then, HERE.then = HERE.then, None
            then()


sys.addaudithook(look)  # for good: it does nothing for threads that ask for nothing


class WriteRecipe(Recipe):
    job: Literal["write"] = "write"
    value: int
    stop: bool = False


class Both:
    """Where the two processes are at work; one that works waits until the other does, too."""

    def __init__(self):
        self.at_work = {0: threading.Event(), 1: threading.Event()}
        self.folders = {}

    def work(self, run: Run) -> None:
        HERE.then = None
        self.folders[processes.rank()] = run.folder
        self.at_work[processes.rank()].set()
        for each in self.at_work.values():
            each.wait(10)


@pytest.fixture
def job(monkeypatch):
    """Register the job; the list holds who works together at this moment, if anyone does."""
    together = []

    def write(recipe: WriteRecipe, run: Run) -> None:
        if together:
            together[-1].work(run)
        if run.main:
            (run.folder / "made").write_text(str(recipe.value))
            if recipe.stop:
                raise KeyboardInterrupt
            run.output("made", run.folder / "made")

    monkeypatch.setitem(registry.job._entries, "write", Entry("job", "write", write, JobFacts(distributed=True)))
    monkeypatch.setattr(lock, "wait", lambda ready, *_, **__: ready())
    monkeypatch.setattr(processes, "rank", lambda: getattr(HERE, "rank", 0))
    return together


def run(value, folder, *, stop=False, on_change="replace"):
    return execute(parse({"job": "write", "value": value, "stop": stop}), folder, quiet=True, on_change=on_change)


def nothing(_folder):
    pass


def interrupted(folder):
    with pytest.raises(KeyboardInterrupt):
        run(1, folder, stop=True)
    record = folder / "record.json"  # the same recipe, but for the interruption
    record.unlink()
    (folder / "recipe.yaml").unlink()
    (folder / "made").unlink()


def damaged(folder):
    run(1, folder)
    (folder / "made").write_text("something else")


def another(folder):
    run(2, folder)


def another_moved_aside(folder):
    run(2, folder)
    folder.rename(folder.with_name(f".{folder.name}.replaced"))


def another_and_a_begun_one(folder):
    run(2, folder)
    with pytest.raises(KeyboardInterrupt):
        run(1, folder, stop=True)
    assert folder.with_name(f".{folder.name}.next").exists()


def one_that_was_just_replaced(folder):
    run(2, folder)
    run(1, folder.with_name("new"))
    commit(folder.with_name("new"), folder)
    (folder / "made").unlink()


def meet(folder, actor, moment):
    """Let one process come to a moment, and the other begin then; return where they work, and if it came so far."""
    both, came = Both(), []

    def other():
        HERE.rank = 1 - actor
        run(1, folder)

    def begin():
        came.append(moment)
        second.start()
        assert both.at_work[1 - actor].wait(10)

    def first():
        HERE.rank, HERE.left, HERE.then = actor, moment, begin
        run(1, folder)

    second, one = threading.Thread(target=other), threading.Thread(target=first)
    yield both
    one.start()
    assert both.at_work[actor].wait(10)
    if not came:
        second.start()
    for thread in (one, second):
        thread.join(10)
        assert not thread.is_alive()
    yield bool(came)


@pytest.mark.parametrize("actor", [0, 1])
@pytest.mark.parametrize(
    "before",
    [nothing, interrupted, damaged, another, another_moved_aside, another_and_a_begun_one, one_that_was_just_replaced],
)
def test_both_processes_choose_the_same_folder_at_any_moment(before, actor, job, tmp_path):
    """One of them begins at any look of the other one, and comes as far as to its work."""
    for moment in range(1000):
        folder = tmp_path / str(moment) / "r"
        before(folder)
        steps = meet(folder, actor, moment)
        job.append(both := next(steps))
        came = next(steps)
        job.clear()
        assert both.folders[0] == both.folders[1], moment
        if not came:
            break
    assert moment > 10
