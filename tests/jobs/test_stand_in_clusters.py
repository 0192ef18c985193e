"""What Ray and Slurm are asked, and what becomes of their answers, with stand-ins that run tasks in threads."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import ModuleType, SimpleNamespace

import pytest

from modicum import registry
from modicum.errors import ModicumError, UnsupportedError
from modicum.jobs import execute
from modicum.jobs.executors import Task
from modicum.jobs.executors.slurm import Jobs
from modicum.recipe import parse
from waiting import ENTRY, lines


class RayError(Exception):
    """Of the stand-in."""


class WorkerCrashedError(RayError):
    """Of the stand-in."""


class UncompletedJobError(Exception):
    """Of the stand-in."""


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.fixture
def ray(monkeypatch, pool):
    """A stand-in that remembers what it was asked; ``errors`` are raised by the next tasks of a name."""
    told = SimpleNamespace(inits=[], asked=[], errors={}, up=False, refuses=None)

    def init(**given):
        if told.refuses:
            raise told.refuses
        told.inits.append(given)
        told.up = True

    def remote(**given):
        assert given == {"max_retries": 0}

        def with_options(function):
            def options(**asked):
                def start(text):
                    told.asked.append(asked)
                    if told.errors.get(asked["name"]):
                        future: Future[str] = Future()
                        future.set_exception(told.errors[asked["name"]].pop())
                    else:
                        future = pool.submit(function, text)
                    return SimpleNamespace(future=lambda: future)

                return SimpleNamespace(remote=start)

            return SimpleNamespace(options=options)

        return with_options

    engine = ModuleType("ray")
    others = ("NodeDiedError", "OutOfMemoryError", "LocalRayletDiedError")
    vars(engine).update(
        is_initialized=lambda: told.up,
        init=init,
        shutdown=lambda: setattr(told, "up", False),
        cluster_resources=lambda: {"CPU": 2.0},
        remote=remote,
        exceptions=SimpleNamespace(
            RayError=RayError,
            WorkerCrashedError=WorkerCrashedError,
            **{name: type(name, (RayError,), {}) for name in others},
        ),
    )
    monkeypatch.setitem(sys.modules, "ray", engine)
    return told


class Job:
    """A job of the stand-in for submitit."""

    job_id = "7"

    def __init__(self, future):
        self.future, self.cancelled = future, False
        self.done, self.result = future.done, future.result

    def cancel(self, check):
        self.cancelled = not check


@pytest.fixture
def submitit(monkeypatch, pool):
    """A stand-in as that for Ray."""
    told = SimpleNamespace(asked=[], errors={}, refuses=None, folders=set())

    class AutoExecutor:
        def __init__(self, folder, cluster):
            told.folders.add((folder, cluster))

        def update_parameters(self, **asked):
            self.asked = asked

        def submit(self, function, text):
            if told.refuses:
                raise told.refuses
            told.asked.append(self.asked)
            if told.errors.get(self.asked["name"]):
                future: Future[str] = Future()
                future.set_exception(told.errors[self.asked["name"]].pop())
                return Job(future)
            return Job(pool.submit(function, text))

    engine = ModuleType("submitit")
    utils = SimpleNamespace(UncompletedJobError=UncompletedJobError, FailedJobError=type("Failed", (Exception,), {}))
    vars(engine).update(AutoExecutor=AutoExecutor, core=SimpleNamespace(utils=utils))
    monkeypatch.setitem(sys.modules, "submitit", engine)
    monkeypatch.setenv("MODICUM_SLURM", "local")
    monkeypatch.setattr("modicum.jobs.executors.slurm.EVERY", 0.01)
    return told


@pytest.fixture(params=["ray", "slurm"])
def cluster(request, monkeypatch):
    """Both, with the error of a lost process; the test's process knows the job that waits."""
    monkeypatch.setitem(registry.job._entries, "wait", ENTRY)
    told = request.getfixturevalue({"ray": "ray", "slurm": "submitit"}[request.param])
    told.name, told.lost = request.param, {"ray": WorkerCrashedError, "slurm": UncompletedJobError}[request.param]
    return told


def grid(tmp_path, **stage):
    log = str(tmp_path / "log")
    first = {"name": "first", "over": ["value"], "job": "wait", "log": log, **stage}
    last = {"name": "last", "job": "wait", "log": log, "after": ["stage:first"], "value": 99}
    return parse({"job": "grid", "axes": {"value": {"value": [0, 1, 2]}}, "stages": [first, last]})


def begun(tmp_path):
    return sorted(cell for what, cell, _ in lines(tmp_path / "log") if what == "begins")


def test_each_cell_is_asked_for_once_with_what_it_needs(cluster, tmp_path):
    recipe = grid(tmp_path, resources={"cpus": 2, "gpus": 1, "memory": 3, "hours": 0.5})
    run = execute(recipe, tmp_path / "g", quiet=True, on=cluster.name, workers=2)
    assert begun(tmp_path) == ["0/0", "1/0", "2/0", "99/0"]
    assert {asked["name"] for asked in cluster.asked} == {*recipe.plan.cells} and len(cluster.asked) == 4
    first, last = cluster.asked[0], cluster.asked[-1]
    if cluster.name == "ray":
        assert [first[key] for key in ("num_cpus", "num_gpus", "memory")] == [2, 1, 3 * 10**9]
        assert (last["num_cpus"], last["num_gpus"]) == (1, 0) and "memory" not in last
        assert cluster.inits[0]["num_cpus"] == 2 and cluster.inits[0]["address"] is None and not cluster.up
    else:
        assert [first[key] for key in ("cpus_per_task", "gpus_per_node", "mem_gb", "timeout_min")] == [2, 1, 3, 30]
        assert last["timeout_min"] == 12 * 60 and "mem_gb" not in last
        assert cluster.folders == {(run.folder / "stages" / ".jobs", "local")}
        few = grid(tmp_path, resources={"cpus": 0.5, "hours": 0.01})
        execute(few, tmp_path / "few", quiet=True, on="slurm", workers=2)
        assert [cluster.asked[4][key] for key in ("cpus_per_task", "timeout_min")] == [1, 1]
    assert len(json.loads((run.folder / "grid.json").read_text())["cells"]) == 4


def test_a_lost_process_costs_its_cell_another_start(cluster, tmp_path):
    recipe = grid(tmp_path)
    name = next(iter(recipe.plan.cells))
    cluster.errors[name] = [cluster.lost("gone")]
    execute(recipe, tmp_path / "g", quiet=True, on=cluster.name, workers=2)
    assert [asked["name"] for asked in cluster.asked].count(name) == 2
    assert begun(tmp_path) == ["0/0", "1/0", "2/0", "99/0"]


def test_a_cell_that_is_lost_again_and_again_is_given_up(cluster, tmp_path):
    recipe = grid(tmp_path)
    name = next(iter(recipe.plan.cells))
    cluster.errors[name] = [cluster.lost("gone") for _ in range(9)]
    with pytest.raises(RuntimeError, match="ended without a word"):
        execute(recipe, tmp_path / "g", quiet=True, on=cluster.name, workers=2)
    assert begun(tmp_path) == ["1/0", "2/0"] and len(cluster.errors[name]) == 7


def test_a_refusal_travels_and_a_cluster_is_let_go(cluster, tmp_path):
    with pytest.raises(ModicumError, match=r"first \d seed 0: told to refuse"):
        execute(grid(tmp_path, refuse=True), tmp_path / "g", quiet=True, on=cluster.name, workers=2)
    assert not getattr(cluster, "up", False)


def test_a_cluster_that_is_gone_or_takes_nothing_is_said(cluster, tmp_path):
    recipe = grid(tmp_path)
    if cluster.name == "ray":
        cluster.errors = {name: [RayError("the head is dead")] for name in recipe.plan.cells}
        told = "The Ray cluster is gone: the head is dead.* run the same command again"
    else:
        cluster.refuses = OSError("sbatch: invalid account")
        told = "Slurm took no job: sbatch: invalid account"
    with pytest.raises(ModicumError, match=told):
        execute(recipe, tmp_path / "g", quiet=True, on=cluster.name, workers=2)
    assert not (tmp_path / "log").exists()


def test_a_cluster_that_does_not_answer_is_refused(ray, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.job._entries, "wait", ENTRY)
    monkeypatch.setenv("RAY_ADDRESS", "ray://nowhere:1")
    ray.refuses = ConnectionError("no route")
    with pytest.raises(UnsupportedError, match=r"The Ray cluster does not answer: no route\.? Check RAY_ADDRESS"):
        execute(grid(tmp_path), tmp_path / "g", quiet=True, on="ray")
    ray.refuses = None
    execute(grid(tmp_path), tmp_path / "g", quiet=True, on="ray")
    assert ray.inits[0]["address"] == "ray://nowhere:1" and ray.inits[0]["num_cpus"] is None


def test_a_cluster_that_was_connected_before_stays_connected(ray, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.job._entries, "wait", ENTRY)
    ray.up = True
    execute(grid(tmp_path), tmp_path / "g", quiet=True, on="ray")
    assert ray.up and not ray.inits


def test_jobs_that_wait_are_cancelled_in_the_end(submitit, tmp_path):
    engine = sys.modules["submitit"]
    waiting = Job(Future())
    engine.AutoExecutor.submit = lambda *_: waiting
    jobs = Jobs(engine, "local", 1)
    future = jobs.submit(Task("a", {}, tmp_path / "stages" / "a"))
    jobs.close()
    assert waiting.cancelled and not future.done()
