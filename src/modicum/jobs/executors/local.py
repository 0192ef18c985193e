"""Stages on this machine: in processes that stay, so that the libraries are imported once in each."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from modicum.jobs.executors import Executor, LostError, Task, answered, perform
from modicum.registry import executor

FEW = 4  # cores up to which each is a worker; of more, a worker takes as many


@executor("local")
@contextmanager
def local(workers: int | None, most: int) -> Iterator[Executor]:
    """Run on this machine's cores: one worker for each of a few, and for every four of many.

    Args:
        workers: How many processes; one runs everything in this process.
        most: How many tasks can run side by side at all.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    devices = _accelerators()
    if workers is None:
        workers = devices or (cores if cores <= FEW else cores // FEW)
    workers = max(1, min(workers, most))
    if workers == 1:
        yield InProcess()
        return
    pool = Pool(workers, threads=max(1, cores // workers), devices=devices)
    try:
        yield pool
    finally:
        pool.close()


def _accelerators() -> int:
    if "torch" not in sys.modules and not any(os.path.exists(p) for p in ("/dev/nvidia0", "/dev/kfd")):  # noqa: PTH110
        return 0  # importing torch takes seconds
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


class InProcess:
    """Runs each task at once, in this process."""

    slots = 1

    def submit(self, task: Task) -> Future[str]:
        """Run the task; return its finished future."""
        future: Future[str] = Future()
        try:
            future.set_result(perform(task))
        except Exception as error:  # whoever waits for the future gets it
            future.set_exception(error)
        return future


class Pool:
    """Workers in processes of their own; each is started when it is first needed, and again when it was killed.

    Args:
        slots: How many.
        threads: Threads of each.
        devices: Accelerators, of which each gets one.
    """

    def __init__(self, slots: int, *, threads: int = 1, devices: int = 0) -> None:
        self.slots = slots
        self._queue: SimpleQueue[tuple[Task, Future[str]] | None] = SimpleQueue()
        self._workers: list[_Worker] = [_Worker(number, threads, devices) for number in range(slots)]
        self._threads = [threading.Thread(target=self._serve, args=(w,), daemon=True) for w in self._workers]
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> Future[str]:
        """Give the task to the next free worker."""
        future: Future[str] = Future()
        self._queue.put((task, future))
        return future

    def close(self) -> None:
        """End all workers; a task at work is cut off, and goes on when its stage is run again."""
        for _ in self._threads:
            self._queue.put(None)
        for worker in self._workers:
            worker.stop()
        for thread, worker in zip(self._threads, self._workers):
            thread.join(timeout=10)
            worker.close()

    def _serve(self, worker: _Worker) -> None:
        while (given := self._queue.get()) is not None:
            task, future = given
            try:
                future.set_result(worker.ask(task))
            except Exception as error:  # whoever waits for the future gets it
                future.set_exception(error)


class _Worker:
    """A process that reads tasks and answers each with a line."""

    def __init__(self, number: int, threads: int, devices: int) -> None:
        self._number, self._threads, self._devices = number, threads, devices
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def ask(self, task: Task) -> str:
        if self._stopped:
            raise LostError("the grid was stopped.")
        if self._process is None or self._process.poll() is not None:
            self._process = self._start()
        process = self._process
        try:
            assert process.stdin is not None and process.stdout is not None  # noqa: S101 - both are pipes
            process.stdin.write(task.dump() + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            line = ""
        if not line.endswith("\n"):
            process.kill()
            status = process.wait()
            self.close()
            raise LostError(f"its process ended without a word (status {status}).")
        return answered(line)

    def stop(self) -> None:
        self._stopped = True
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def close(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process else ():
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def _start(self) -> subprocess.Popen[str]:
        threads = str(self._threads)
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._devices and "CUDA_VISIBLE_DEVICES" not in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = str(self._number % self._devices)
        return subprocess.Popen(
            [sys.executable, "-m", "modicum.jobs.executors.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
