"""Stages on a Ray cluster whose machines share the folder (extra ``cluster``)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from modicum.errors import MissingExtraError, ModicumError, UnsupportedError, first_line
from modicum.jobs.executors import Executor, LostError, Task, answer, answered
from modicum.registry import executor

GIGABYTE = 10**9


@executor("ray")
@contextmanager
def ray(workers: int | None, most: int) -> Iterator[Executor]:
    """Run on a Ray cluster: the one at ``RAY_ADDRESS``, or one that is started on this machine.

    Args:
        workers: How many tasks the cluster is given at a time; as many as it has processors when not given.
        most: How many tasks can run side by side at all.

    Raises:
        MissingExtraError: Ray is not installed.
        UnsupportedError: The cluster does not answer.
    """
    try:
        import ray as engine
    except ImportError:
        raise MissingExtraError("ray, which --on ray needs,", "cluster") from None
    ours = not engine.is_initialized()
    if ours:
        try:
            engine.init(
                address=os.environ.get("RAY_ADDRESS"),
                num_cpus=None if os.environ.get("RAY_ADDRESS") else workers,
                include_dashboard=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UnsupportedError(f"The Ray cluster does not answer: {first_line(error)} Check RAY_ADDRESS.") from None
    try:
        cores = int(engine.cluster_resources().get("CPU", 1))
        yield Cluster(engine, max(1, min(workers or cores, most)))
    finally:
        if ours:
            engine.shutdown()


class Cluster:
    """Hands tasks to Ray, which finds a machine with what each needs.

    Args:
        engine: The module ``ray``, connected.
        slots: Tasks at a time.
    """

    def __init__(self, engine: Any, slots: int) -> None:
        self.slots = slots
        self._engine = engine
        # A lost stage is started again by whoever waits for it: it goes on where it was.
        self._answer = engine.remote(max_retries=0)(answer)

    def submit(self, task: Task) -> Future[str]:
        """Hand the task to the cluster."""
        asked: dict[str, Any] = {"num_cpus": task.resources.get("cpus", 1), "num_gpus": task.resources.get("gpus", 0)}
        if "memory" in task.resources:
            asked["memory"] = int(task.resources["memory"] * GIGABYTE)
        future: Future[str] = Future()
        given = self._answer.options(name=task.name, **asked).remote(task.dump()).future()
        given.add_done_callback(lambda done: self._hand_on(done, future))
        return future

    def _hand_on(self, done: Future[str], future: Future[str]) -> None:
        errors = self._engine.exceptions
        try:
            future.set_result(answered(done.result()))
        except (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.LocalRayletDiedError):
            future.set_exception(LostError("its process on the cluster ended without a word."))
        except errors.RayError as error:
            told = f"The Ray cluster is gone: {first_line(error)} Start it, and run the same command again to go on."
            future.set_exception(ModicumError(told))
        except Exception as error:  # whoever waits for the future gets it
            future.set_exception(error)
