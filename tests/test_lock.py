"""One writer for each folder: refused while its owner lives, taken over when it is dead, whoever else tries."""

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from modicum import lock
from modicum.errors import CheckpointError
from modicum.record import Run, read_record


def left_by(path, **changes):
    """Leave the lock of another process, which differs from this one in ``changes``."""
    path.write_text(json.dumps(asdict(replace(lock._me(), **changes))))


def dead_process() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_there_while_it_is_held_and_gone_afterwards(tmp_path):
    path = tmp_path / ".lock"
    with lock.hold(path, "the folder"):
        owner = lock.read_owner(path)
        assert owner is not None and owner.pid == os.getpid() and owner.alive()
    with pytest.raises(KeyError), lock.hold(path, "the folder"):
        raise KeyError
    assert list(tmp_path.iterdir()) == [] and lock.read_owner(path) is None


def test_nobody_is_waited_for_after_the_last_try(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setattr(lock.time, "sleep", slept.append)
    (tmp_path / ".lock").write_text("{")
    with pytest.raises(CheckpointError, match="no lock file"):
        lock.read_owner(tmp_path / ".lock", tries=3)
    assert len(slept) == 2


def test_a_living_owner_is_named(tmp_path, sleeper):
    left_by(tmp_path / ".lock", pid=sleeper.pid, started=lock._start_of(sleeper.pid))
    with (
        pytest.raises(CheckpointError, match=f"runs/a is being written by process {sleeper.pid} on ") as refused,
        lock.hold(tmp_path / ".lock", "runs/a"),
    ):
        pass
    assert "\n" not in str(refused.value) and "Wait until it ends, or choose another folder" in str(refused.value)


def test_this_process_has_no_second_go_either(tmp_path):
    with (
        lock.hold(tmp_path / ".lock", "runs/a"),
        pytest.raises(CheckpointError, match="this very process"),
        lock.hold(tmp_path / ".lock", "runs/a"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stale", ["dead", "unreaped", "number given anew", "restarted machine"])
def test_the_lock_of_a_dead_owner_is_taken_over(tmp_path, sleeper, stale):
    path = tmp_path / ".lock"
    if stale == "dead":
        left_by(path, pid=dead_process(), started="1")
    if stale == "unreaped":
        left_by(path, pid=sleeper.pid, started=lock._start_of(sleeper.pid))
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    if stale == "number given anew":
        left_by(path, pid=sleeper.pid, started="1")
    if stale == "restarted machine":
        left_by(path, pid=sleeper.pid, started=lock._start_of(sleeper.pid), boot="another")
    with lock.hold(path, "the folder"):
        assert lock.read_owner(path).pid == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_of_its_locks_goes_with_the_next_run(tmp_path, sleeper):
    run = {"job": "merge", "recipe": {"a": 1}}
    with Run(tmp_path / "run", **run):
        pass
    names = (".lock." + "0" * 32, ".model.lock." + "f" * 32)
    for name in names:
        left_by(tmp_path / "run" / name, pid=dead_process(), started="1")
    living = tmp_path / "run" / (".lock." + "a" * 32)
    left_by(living, pid=sleeper.pid, started=lock._start_of(sleeper.pid))
    left_by(tmp_path / "run" / ".lock", pid=dead_process(), started="1")
    Run(tmp_path / "run", **run).tidy()
    assert {path.name for path in (tmp_path / "run").glob(".*")} == {living.name}


@pytest.mark.parametrize("changes", [{"host": "far"}, {"machine": "twin"}, {"namespace": "pid:[container]"}])
def test_an_owner_that_cannot_be_seen_is_refused_with_the_way_out(tmp_path, changes):
    path = tmp_path / ".lock"
    left_by(path, pid=dead_process(), **changes)
    with pytest.raises(CheckpointError, match=f"delete {path} and run again"), lock.hold(path, "the folder"):
        pass
    path.unlink()
    with lock.hold(path, "the folder"):
        pass


def test_work_begins_where_the_lock_is_ours_or_its_owner_cannot_be_seen(tmp_path, sleeper):
    path = tmp_path / ".lock"
    with ExitStack() as locks:
        assert lock.enter(locks, path, tmp_path) and path.exists()
        assert not lock.enter(locks, path, tmp_path)
    assert not path.exists()
    left_by(path, pid=sleeper.pid, started=lock._start_of(sleeper.pid))
    with ExitStack() as locks:
        assert not lock.enter(locks, path, tmp_path)
    left_by(path, machine="another")
    with ExitStack() as locks:
        assert lock.enter(locks, path, tmp_path)
    assert path.exists()


def test_a_file_that_is_no_lock_is_said_to_be_none(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for text in ("", "{}", "[1]", "pid 5"):
        (tmp_path / ".lock").write_text(text)
        with pytest.raises(CheckpointError, match="delete it and run again"), lock.hold(tmp_path / ".lock", "x"):
            pass


def test_a_file_system_without_links_locks_too(tmp_path, monkeypatch):
    def no_links(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with (
        lock.hold(tmp_path / ".lock", "x"),
        pytest.raises(CheckpointError, match="this very process"),
        lock.hold(tmp_path / ".lock", "x"),
    ):
        pass
    left_by(tmp_path / ".lock", pid=dead_process(), started="1")
    with lock.hold(tmp_path / ".lock", "x"):
        pass
    assert list(tmp_path.iterdir()) == []


def contend(path, barrier, held, refused, done):
    barrier.wait()
    try:
        with lock.hold(path, "x"):
            held.put(os.getpid())
            done.wait()
    except CheckpointError:
        refused.put(os.getpid())
        done.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_one_gets_the_lock(tmp_path, stale):
    context, count = multiprocessing.get_context("fork"), 6
    for attempt in range(4):
        path = tmp_path / f"{attempt}.lock"
        if stale:
            left_by(path, pid=dead_process(), started="1")
        barrier, done = context.Barrier(count), context.Event()
        held, refused = context.Queue(), context.Queue()
        crowd = [context.Process(target=contend, args=(path, barrier, held, refused, done)) for _ in range(count)]
        for process in crowd:
            process.start()
        try:
            assert {refused.get(timeout=30) for _ in range(count - 1)} | {held.get(timeout=30)} == {
                process.pid for process in crowd
            }
        finally:
            done.set()
            for process in crowd:
                process.join()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_removed_by_hand_and_taken_by_another_stays_the_others(tmp_path, sleeper):
    path = tmp_path / ".lock"
    with lock.hold(path, "x"):
        path.unlink()
        left_by(path, pid=sleeper.pid)
    assert lock.read_owner(path).pid == sleeper.pid


def test_of_two_who_saw_a_dead_owner_the_slower_one_takes_nothing(tmp_path):
    path, beside = tmp_path / ".lock", tmp_path / "beside"
    left_by(path, pid=dead_process(), started="1")
    dead = lock.read_owner(path)
    with lock.hold(path, "x"):
        left_by(beside, pid=1)
        assert not lock._take_over(beside, path, dead)
        assert lock.read_owner(path).pid == os.getpid()
    assert not lock._take_over(beside, path, dead) and not path.exists()


def test_a_forked_copy_does_not_end_its_parents_lock(tmp_path):
    path, parent = tmp_path / ".lock", os.getpid()
    try:
        with lock.hold(path, "x"):
            child = os.fork()
            if child == 0:
                raise KeyError
            assert os.waitpid(child, 0)[1] == 0
            assert path.exists()
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert not path.exists()


def test_a_second_run_is_refused_while_the_first_works(tmp_path):
    def run(**settings):
        return Run(tmp_path / "r", job="train", recipe={"seed": 0}, quiet=True, **settings)

    late = run(on_change="replace")
    with run() as first:
        first.log("train", step=1)
        for second in (run(), run(on_change="keep"), late):
            with pytest.raises(CheckpointError, match=r"r is being written by"), second:
                pass
        assert (tmp_path / "r" / "log.jsonl").exists() and read_record(tmp_path / "r")["status"] == "running"
    assert run().done and {path.name for path in (tmp_path / "r").iterdir()} == {
        "record.json",
        "recipe.yaml",
        "log.jsonl",
    }


def test_a_run_continues_what_was_recorded_since_it_looked(tmp_path):
    def run():
        return Run(tmp_path / "r", job="train", recipe={"seed": 0}, quiet=True)

    late = run()
    with run() as first:
        first.record["metrics"]["loss"] = 1.5
    with late:
        assert late.record["metrics"] == {"loss": 1.5}


def test_followers_wait_while_the_first_process_lives(tmp_path, monkeypatch, sleeper):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    path, looks = tmp_path / ".lock", []
    left_by(path, pid=sleeper.pid, started=lock._start_of(sleeper.pid))

    def ready():
        looks.append(1)
        return len(looks) > 5

    lock.wait(ready, path, "the stage", every=0.01)
    threading.Timer(0.1, sleeper.kill).start()
    with pytest.raises(RuntimeError, match="ended before it finished the stage"):
        lock.wait(lambda: False, path, "the stage", every=0.01)
    # A lock of another launch, or of a process dead for long, is not the first process's: it may come yet.
    monkeypatch.setenv("MODICUM_STAGE_TIMEOUT", "0.1")
    with pytest.raises(RuntimeError, match=r"did not finish the stage within 0 s"):
        lock.wait(lambda: False, path, "the stage", every=0.01)


def test_the_end_of_another_launch_is_not_the_end_of_this_one(tmp_path, monkeypatch, sleeper):
    monkeypatch.setenv("MODICUM_STAGE_TIMEOUT", "0.3")
    left_by(tmp_path / ".lock", pid=sleeper.pid, started=lock._start_of(sleeper.pid), launch="far:1")
    threading.Timer(0.1, sleeper.kill).start()
    with pytest.raises(RuntimeError, match="did not finish the stage"):
        lock.wait(lambda: False, tmp_path / ".lock", "the stage", every=0.01)


def test_followers_do_not_start_in_what_the_first_process_is_about_to_empty(tmp_path, monkeypatch):
    def run(recipe):
        return Run(tmp_path / "r", job="train", recipe=recipe, quiet=True, on_change="replace")

    with run({"seed": 0}):
        (tmp_path / "r" / "old").mkdir()
    monkeypatch.setenv("RANK", "1")
    follower = run({"seed": 1})
    monkeypatch.delenv("RANK")
    entered = []
    thread = threading.Thread(target=lambda: entered.append(follower.__enter__() and (tmp_path / "r/old").exists()))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    with run({"seed": 1}):
        thread.join(10)
    assert entered == [False]


def test_a_file_system_that_makes_a_file_twice_is_refused(tmp_path, monkeypatch):
    lock.check_exclusive(tmp_path)
    usual = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r", **given: usual(self, mode.replace("x", "w"), **given))
    with pytest.raises(CheckpointError, match="makes a file twice"):
        lock.check_exclusive(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_a_kill_left_while_the_file_system_was_tried_is_removed(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_given: None)
        lock.check_exclusive(tmp_path)
    [left] = tmp_path.iterdir()
    lock.remove_leftovers(tmp_path)
    assert left.exists()  # another process may be just trying
    os.utime(left, (0, 0))
    lock.remove_leftovers(tmp_path)
    assert not left.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("name", [lock.NAME, ".cell.claim"])
def test_what_a_kill_cuts_off_before_it_says_whose_it_is_goes_at_once(tmp_path, monkeypatch, name):
    def cut_off():
        monkeypatch.setattr(lock.json, "dump", lambda *_: os.kill(os.getpid(), 9))
        with lock.hold(tmp_path / name, "x"):
            pass

    if (pid := os.fork()) == 0:
        try:
            cut_off()
        finally:
            os._exit(1)
    os.waitpid(pid, 0)
    [left] = tmp_path.iterdir()
    assert left.read_text() == ""
    (tmp_path / (left.name[:-32] + "f" * 32)).touch()  # of a machine that is not known
    lock.remove_leftovers(tmp_path)
    assert [path.name[-32:] for path in tmp_path.iterdir()] == ["f" * 32]


def test_claims_of_the_dead_go_and_those_of_the_living_stay(tmp_path, sleeper):
    for name, process in (("dead", dead_process()), ("living", sleeper.pid)):
        started = lock._start_of(process) or "1"
        left_by(tmp_path / f".{name}{lock.CLAIM}", pid=process, started=started)
        left_by(tmp_path / f".{name}{lock.CLAIM}.{'a' * 32}", pid=process, started=started)
    (tmp_path / "cell").mkdir()
    lock.remove_claims(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"cell", ".living.claim", f".living.claim.{'a' * 32}"}
