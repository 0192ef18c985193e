from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import CheckpointError
from modicum.weights import stream
from modicum.weights.files import Spec
from modicum.weights.kernels.blocks import fold
from modicum.weights.stream import map_tensors, run_all
from weights.conftest import Family, write_model

SPECS = {f"layer.{i}.weight": Spec((i + 1, 3), torch.float32) for i in range(6)}


def make(name: str) -> tuple[torch.Tensor, dict[str, object]]:
    return torch.full(SPECS[name].shape, float(name.split(".")[1])), {"seen": name}


def test_shards_and_index_hold_what_was_made(tmp_path: Path) -> None:
    found = map_tensors(make, SPECS, tmp_path / "out", identity=1, shard_bytes=100, companions={"config.json": b"{}"})
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files[0] == "config.json"
    assert "model.safetensors.index.json" in files
    loaded = {k: v for f in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(f).items()}
    assert loaded.keys() == SPECS.keys()
    assert all(torch.equal(tensor, make(name)[0]) for name, tensor in loaded.items())
    assert found == {name: {"seen": name} for name in SPECS}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_fold_writes_into_the_file_and_only_what_is_returned_counts(tmp_path: Path) -> None:
    base, expert = torch.arange(16.0).view(4, 4), torch.ones(4, 4)
    answers = {"first": lambda a, _: a, "second": lambda _, b: b, "turned": lambda a, _: a.T}
    places: dict[str, int] = {}

    def make_both(name: str) -> tuple[torch.Tensor, dict[str, object]]:
        first = fold(base, [expert], lambda deltas: deltas[0] * 0)
        second = fold(base, [expert], lambda deltas: deltas[0])
        assert first.data_ptr() != second.data_ptr()
        places[name] = first.data_ptr()
        return answers[name](first, second), {}

    map_tensors(make_both, {name: Spec((4, 4), torch.float32) for name in answers}, tmp_path / "out", identity=1)
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(loaded[name], answers[name](base, expert)) for name in answers)
    if stream.MAPPED:
        assert places["second"] - places["first"] == 64  # bytes of one tensor: they lie side by side in one file


def test_a_broken_run_continues_with_what_is_missing(tmp_path: Path) -> None:
    made: list[str] = []

    def fragile(name: str) -> tuple[torch.Tensor, dict[str, object]]:
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(name)
        return make(name)

    with pytest.raises(KeyboardInterrupt):
        map_tensors(fragile, SPECS, tmp_path / "out", identity=1, workers=1)
    assert not (tmp_path / "out").exists()
    # A line cut off by the kill must not spoil the next.
    (journal,) = (tmp_path / ".out.partial").glob("journal.*")
    journal.write_text(journal.read_text() + '["layer.9')
    again: list[str] = []

    def watched(name: str) -> tuple[torch.Tensor, dict[str, object]]:
        again.append(name)
        return make(name)

    map_tensors(watched, SPECS, tmp_path / "out", identity=1, workers=1)
    assert sorted(made + again) == sorted(SPECS)
    map_tensors(make, SPECS, tmp_path / "straight", identity=1)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "straight/model.safetensors").read_bytes()


def test_what_is_done_when_another_fails_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    def fragile(name: str) -> str:
        if name == "d":
            raise CheckpointError("d is bad. Mend it.")
        return name.upper()

    # Which of several that are done is seen first is not said: here it is the one that failed.
    monkeypatch.setattr(stream, "as_completed", lambda tasks: sorted(tasks, key=lambda task: task.exception() is None))
    found = {}
    with pytest.raises(CheckpointError, match="d is bad"):
        for name, result in run_all(fragile, "abcde", workers=1):
            found[name] = result
    assert found == {"a": "A", "b": "B", "c": "C", "e": "E"}


FORKED = """
import os, signal, sys, threading, time
from pathlib import Path
import torch
from modicum.errors import CheckpointError
from modicum.weights.files import Spec
from modicum.weights.stream import map_tensors
here, out, case = os.getpid(), Path(sys.argv[1]), sys.argv[2]
def make(name):
    if (os.getpid() == here) != (case == "threads"):
        raise SystemExit("in the wrong process")
    if case == "bad":
        raise CheckpointError("c is bad. Mend it.")
    if case == "killed" and name == "f":
        time.sleep(0.5)  # the other worker waits for work by then, and is ended by the pool
        os.kill(os.getpid(), signal.SIGKILL)
    if case == "idle" and name == "f":  # the other one, which waits for work, holds the lock of the queue
        time.sleep(0.5)
        siblings = Path(f"/proc/{here}/task/{here}/children").read_text().split()
        os.kill(next(int(pid) for pid in siblings if int(pid) != os.getpid()), signal.SIGKILL)
        time.sleep(60)
    return torch.ones(3), {}
def interrupt(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGTERM, interrupt)  # as the command line has it
if case == "early":  # Ctrl-C reaches a worker that has hardly begun: it is the first process's to decide
    os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGINT))
stop = threading.Event()
if case == "threads":
    threading.Thread(target=stop.wait).start()
try:
    map_tensors(make, {name: Spec((3,), torch.float32) for name in "abcdef"}, out, identity=1, workers=2, fork=True)
    print("done")
except (MemoryError, CheckpointError) as error:
    print(type(error).__name__, error)
stop.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
@pytest.mark.parametrize(
    ("case", "said", "left"),
    [
        ("good", "done", ["out"]),
        ("early", "done", ["out"]),
        ("threads", "done", ["out"]),  # a process with threads is not forked
        ("bad", "CheckpointError c is bad. Mend it.", []),
        ("killed", "MemoryError A worker process was ended from outside", [".out.partial"]),  # for another try
        ("idle", "MemoryError A worker process was ended from outside", [".out.partial"]),
    ],
)
def test_forked_workers(tmp_path: Path, case: str, said: str, left: list[str]) -> None:
    command = [sys.executable, "-c", FORKED, str(tmp_path / "out"), case]
    found = subprocess.run(command, capture_output=True, text=True, timeout=40)
    assert found.stdout.startswith(said), found.stderr
    assert "Traceback" not in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == left


def test_tensors_of_many_pages_keep_their_bytes_and_those_of_their_neighbours(tmp_path: Path) -> None:
    """The pages of a finished one leave the process; those that it shares with another one stay."""
    sizes = [5, 1024, 3000, 1, 20_000, 4097, 1023]
    made = {f"t{i}": torch.arange(size, dtype=torch.float32) + i for i, size in enumerate(sizes)}
    specs = {name: Spec(tuple(tensor.shape), torch.float32) for name, tensor in made.items()}
    map_tensors(lambda name: (made[name].clone(), {}), specs, tmp_path / "out", identity=1, workers=2)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in made.items())


def test_another_identity_starts_over(tmp_path: Path) -> None:
    def broken(name: str) -> tuple[torch.Tensor, dict[str, object]]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_tensors(broken, SPECS, tmp_path / "out", identity=1)
    made = map_tensors(make, SPECS, tmp_path / "out", identity=2)
    assert made.keys() == SPECS.keys()


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stream, "put", full)
    with pytest.raises(CheckpointError, match="is full: no space is left. Free some"):
        map_tensors(make, SPECS, tmp_path / "out", identity=1)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_known_before_work_begins(tmp_path: Path) -> None:
    huge = {"w": Spec((1 << 50,), torch.float32)}
    with pytest.raises(CheckpointError, match="needs 4503599.63 GB"):
        map_tensors(make, huge, tmp_path / "out", identity=1)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(CheckpointError, match="Cannot write .*: Permission denied. Choose another folder"):
        map_tensors(make, SPECS, tmp_path / "out", identity=1)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(CheckpointError, match="exists already"):
        map_tensors(make, SPECS, tmp_path / "out", identity=1)


MERGE = """
import sys, time
from pathlib import Path
from modicum.weights import Checkpoint
from modicum.weights.merge import run_plan
from modicum.weights.plan import plan_merge
module, slow = sys.modules[run_plan.__module__], float(sys.argv[4])
run_step = module.run_step
def slow_step(*args, **kwargs):
    time.sleep(slow)
    return run_step(*args, **kwargs)
module.run_step = slow_step
base, expert = (Checkpoint(path) for path in sys.argv[1:3])
plan = plan_merge(base, [expert], method="task_arithmetic", knobs={"scale": 0.5})
run_plan(plan, Path(sys.argv[3]), workers=2, fork=sys.argv[5] == "fork")
"""


@pytest.mark.parametrize(
    "workers", ["threads", pytest.param("fork", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux"))]
)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(family: Family, tmp_path: Path, workers: str) -> None:
    base, (expert, _) = family

    def command(out: str, slow: float) -> list[str]:
        return [sys.executable, "-c", MERGE, str(base), str(expert), str(tmp_path / out), str(slow), workers]

    process = subprocess.Popen(command("out", 0.5))
    partial = tmp_path / ".out.partial"
    deadline = time.monotonic() + 60
    while not (partial / "journal.0.jsonl").exists() or "[" not in (partial / "journal.0.jsonl").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    children = listed.read_text().split() if workers == "fork" else []
    assert len(children) == (2 if workers == "fork" else 0)
    process.kill()
    process.wait()
    while any(Path(f"/proc/{child}").exists() for child in children):  # they end by themselves
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert partial.exists()
    assert not (tmp_path / "out").exists()
    subprocess.run(command("out", 0), check=True)
    subprocess.run([*command("straight", 0)[:-1], "threads"], check=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_two_ranks_write_the_bytes_of_one(family: Family, tmp_path: Path) -> None:
    base, (expert, _) = family
    command = [sys.executable, "-c", MERGE, str(base), str(expert), str(tmp_path / "two"), "0", "fork"]
    ranks = [subprocess.Popen(command, env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}) for rank in range(2)]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    command[-3] = str(tmp_path / "one")
    subprocess.run(command, check=True)
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def write(out: Path, rank: int, world: int, slow: float, identity: int) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}

    def slowly(name: str) -> tuple[torch.Tensor, dict[str, object]]:
        time.sleep(slow)
        return make(name)

    try:
        map_tensors(slowly, SPECS, out, identity=identity, workers=1)
        said = "done"
    except (RuntimeError, CheckpointError) as error:
        said = f"{type(error).__name__}: {error}"
    out.with_name(f"said.{rank}").write_text(said)


def launch(out: Path, *, slow: float = 0, rank: int = 0, world: int = 1, identity: int = 1) -> BaseProcess:
    """Start a process that writes ``SPECS``; forked from a server that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["modicum.weights.stream"])
    process = context.Process(target=write, args=(out, rank, world, slow, identity))
    process.start()
    return process


def said(out: Path, process: BaseProcess, rank: int = 0) -> str:
    process.join(timeout=30)
    assert process.exitcode == 0
    return out.with_name(f"said.{rank}").read_text()


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_job_for_one_folder_is_refused_while_the_first_works(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = launch(out, slow=0.15)
    wait_until((tmp_path / ".out.partial/journal.0.jsonl").exists)
    for identity in (1, 2):  # whether it would go on with the work or start over
        with pytest.raises(CheckpointError, match=f"out is being written by process {first.pid} on .*Wait") as refused:
            map_tensors(make, SPECS, out, identity=identity)
        assert "\n" not in str(refused.value)
    assert said(out, first) == "done"
    map_tensors(make, SPECS, tmp_path / "clean", identity=1)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "clean/model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clean", "out", "said.0"]


def test_a_second_job_in_this_process_is_refused_too(tmp_path: Path) -> None:
    def nested(name: str) -> tuple[torch.Tensor, dict[str, object]]:
        with pytest.raises(CheckpointError, match="being written by this very process"):
            map_tensors(make, SPECS, tmp_path / "out", identity=1)
        return make(name)

    map_tensors(nested, SPECS, tmp_path / "out", identity=1, workers=1)
    assert load_file(tmp_path / "out/model.safetensors").keys() == SPECS.keys()


@pytest.mark.parametrize("dead", [0, 1])
def test_whoever_waits_for_a_dead_process_gives_up(tmp_path: Path, dead: int) -> None:
    out = tmp_path / "out"
    ranks = [launch(out, slow=0.3 if rank == dead else 0, rank=rank, world=2) for rank in range(2)]
    wait_until(lambda: all((tmp_path / f".out.partial/journal.{rank}.jsonl").exists() for rank in range(2)))
    ranks[dead].kill()
    expected = "The first process ended before" if dead == 0 else "Process 1 of 2 ended before"
    assert expected in said(out, ranks[1 - dead], 1 - dead)
    assert (tmp_path / (".out.lock" if dead == 0 else ".out.partial/rank.1.lock")).exists()  # and keeps nobody out
    again = [launch(out, rank=rank, world=2) for rank in range(2)]
    assert [said(out, process, rank) for rank, process in enumerate(again)] == ["done"] * 2
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]


def test_a_process_that_finds_all_done_ends_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "_finish", stop)
        map_tensors(make, SPECS, out, identity=1)
    early = launch(out, rank=0, world=2)
    time.sleep(0.5)  # long enough for it to be done, were it alone
    assert said(out, launch(out, rank=1, world=2), 1) == said(out, early) == "done"


def test_processes_that_were_told_different_things_do_not_wait_for_each_other(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks = [launch(out, rank=rank, world=2, identity=rank) for rank in range(2)]
    assert "makes something else" in said(out, ranks[1], 1)
    assert "Process 1 of 2 ended before" in said(out, ranks[0])


def test_memory_does_not_grow_with_the_number_of_tensors(tmp_path: Path) -> None:
    from modicum.weights import Checkpoint
    from modicum.weights.plan import plan_merge

    bounds = []
    for layers in (4, 40):
        tensors = {f"{i}.weight": torch.zeros(64, 64) for i in range(layers)}
        models = [Checkpoint(write_model(tmp_path / f"{layers}-{m}", tensors)) for m in range(3)]
        plan = plan_merge(models[0], models[1:], method="task_arithmetic", knobs={})
        bounds.append(plan.memory_bound())
    assert bounds[0] == bounds[1]
