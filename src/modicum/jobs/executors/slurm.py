"""Stages as jobs of a Slurm cluster whose machines share the folder, through submitit (extra ``cluster``)."""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from modicum.errors import MissingExtraError, UnsupportedError, first_line
from modicum.jobs.executors import Executor, LostError, Task, answer, answered
from modicum.registry import executor

WAITING = 32  # jobs in the queue at a time, when the user does not say
EVERY = 0.5  # seconds between two looks at the jobs
HOURS = 12.0  # that a job may take, when the stage does not say
CLUSTER = "MODICUM_SLURM"  # set to `local`, it tries jobs out on this machine


@executor("slurm")
@contextmanager
def slurm(workers: int | None, most: int) -> Iterator[Executor]:
    """Run each stage as a job of Slurm; partition and account come from ``SBATCH_PARTITION`` and ``SBATCH_ACCOUNT``.

    Args:
        workers: How many jobs wait or run at a time.
        most: How many tasks can run side by side at all.

    Raises:
        MissingExtraError: submitit is not installed.
        UnsupportedError: This machine cannot submit jobs.
    """
    try:
        import submitit as engine
    except ImportError:
        raise MissingExtraError("submitit, which --on slurm needs,", "cluster") from None
    cluster = os.environ.get(CLUSTER, "slurm")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UnsupportedError(
            f"There is no sbatch on this machine. Start the grid where jobs are submitted; {CLUSTER}=local tries it "
            "out here."
        )
    jobs = Jobs(engine, cluster, max(1, min(workers or WAITING, most)))
    try:
        yield jobs
    finally:
        jobs.close()


class Jobs:
    """Submits tasks, and looks after the jobs from a thread.

    Args:
        engine: The module ``submitit``.
        cluster: ``slurm``, or ``local`` for this machine.
        slots: Jobs at a time.
    """

    def __init__(self, engine: Any, cluster: str, slots: int) -> None:
        self.slots = slots
        self._engine, self._cluster = engine, cluster
        self._jobs: dict[Future[str], Any] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def submit(self, task: Task) -> Future[str]:
        """Submit the task as a job; its logs go to ``stages/.jobs``."""
        found = self._engine.AutoExecutor(folder=task.folder.parent / ".jobs", cluster=self._cluster)
        found.update_parameters(
            name=task.name,
            # Slurm counts whole minutes, processors and accelerators; a share of one is one, as 0 minutes have no end.
            timeout_min=max(1, math.ceil(60 * task.resources.get("hours", HOURS))),
            cpus_per_task=max(1, math.ceil(task.resources.get("cpus", 1))),
            gpus_per_node=math.ceil(task.resources.get("gpus", 0)),
            **({"mem_gb": task.resources["memory"]} if "memory" in task.resources else {}),
        )
        future: Future[str] = Future()
        try:
            job = found.submit(answer, task.dump())
        except Exception as error:  # sbatch refused, in its own words
            future.set_exception(UnsupportedError(f"Slurm took no job: {first_line(error)}"))
            return future
        with self._lock:
            self._jobs[future] = job
        return future

    def close(self) -> None:
        """Cancel what is still in the queue or at work."""
        self._closed.set()
        self._watcher.join(timeout=10)
        for job in self._jobs.values():
            job.cancel(check=False)

    def _watch(self) -> None:
        while not self._closed.is_set():
            with self._lock:
                ended = [(future, job) for future, job in self._jobs.items() if job.done()]
                for future, _ in ended:
                    del self._jobs[future]
            for future, job in ended:
                self._hand_on(job, future)
            time.sleep(EVERY)

    def _hand_on(self, job: Any, future: Future[str]) -> None:
        try:
            future.set_result(answered(job.result()))
        except (self._engine.core.utils.UncompletedJobError, self._engine.core.utils.FailedJobError) as error:
            future.set_exception(LostError(f"its job {job.job_id} ended without a word ({first_line(error)})"))
        except Exception as error:  # whoever waits for the future gets it
            future.set_exception(error)
