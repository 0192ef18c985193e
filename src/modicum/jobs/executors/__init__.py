"""Where stages run: an executor takes tasks and gives a future for each.

``local`` starts processes on this machine; ``ray`` and ``slurm`` hand tasks to a cluster whose machines share the
folder. An executor is one file with a function under its decorator, ``executor(name)``, that returns an
:class:`Executor` as a context. A task is plain data; its process finds everything else in the folder, and claims the
stage while it works, so that no stage is done twice however many processes share a folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from modicum.errors import ModicumError, RecipeError
from modicum.registry import executor as executors

DONE = "done"


@dataclass(frozen=True)
class Task:
    """A stage to run.

    Attributes:
        name: Of the stage.
        recipe: Without references to other stages.
        folder: Of its run.
        claims: Folder of the claims that several processes share; ``None`` where one works alone.
        quiet: Print nothing.
        resources: ``cpus``, ``gpus``, ``memory`` in GB and ``hours``, for executors on several machines.
    """

    name: str
    recipe: Mapping[str, Any]
    folder: Path
    claims: Path | None = None
    quiet: bool = True
    resources: Mapping[str, float] = field(default_factory=dict)

    def dump(self) -> str:
        """Return the task as a line of JSON."""
        told = asdict(self) | {"folder": str(self.folder), "claims": str(self.claims) if self.claims else None}
        return json.dumps(told)

    @classmethod
    def load(cls, text: str) -> Task:
        """Return the task that :meth:`dump` wrote."""
        told = json.loads(text)
        claims = Path(told["claims"]) if told["claims"] else None
        return cls(**told | {"folder": Path(told["folder"]), "claims": claims})


class LostError(RuntimeError):
    """The process that worked on a stage ended without a word: it was killed, or its machine is gone."""


class Executor(Protocol):
    """Runs tasks.

    Attributes:
        slots: How many tasks it is given at a time.
    """

    slots: int

    def submit(self, task: Task, /) -> Future[str]:
        """Return a future of :func:`perform`; it raises what that raised, or :class:`LostError`."""


def perform(task: Task) -> str:
    """Run a stage in this process.

    Returns:
        ``done``; or, where another process works on the stage, a sentence that says so.
    """
    from modicum.cells import claim
    from modicum.jobs import execute
    from modicum.lock import HeldError
    from modicum.recipe import parse

    with claim(task.claims, task.name) as mine:
        if not mine:
            return "another process works on it; waiting for that"
        try:
            execute(parse(dict(task.recipe)), task.folder, quiet=task.quiet, on_change="replace")
        except HeldError as error:
            return str(error)
    return DONE


def answer(text: str) -> str:
    """Run a task in the process of an executor.

    Args:
        text: Of :meth:`Task.dump`.

    Returns:
        JSON for :func:`answered`: what :func:`perform` returned, or what it raised.
    """
    try:
        return json.dumps({"told": perform(Task.load(text))})
    except ModicumError as error:
        return json.dumps({"refused": str(error)})
    except Exception as error:  # told to the process that gave the task
        return json.dumps({"failed": f"{type(error).__name__}: {error}"})


def answered(text: str) -> str:
    """Return what :func:`perform` returned in another process, or raise what it raised there.

    Args:
        text: Of :func:`answer`.

    Raises:
        ModicumError: The user's input is wrong.
        RuntimeError: Anything else went wrong.
    """
    found = json.loads(text)
    if "refused" in found:
        raise ModicumError(found["refused"])
    if "failed" in found:
        raise RuntimeError(found["failed"])
    return str(found["told"])


@contextmanager
def opened(name: str | None, workers: int | None, *, most: int, serial: bool = False) -> Iterator[Executor]:
    """Give the executor of a name.

    Args:
        name: ``local`` when not given.
        workers: Tasks at a time; as many as the machine has cores for when not given.
        most: Tasks that can run side by side at all.
        serial: Without a name and a number of workers, run one after another in this process.

    Raises:
        RecipeError: There is no such executor, or fewer than one worker.
    """
    if workers is not None and workers < 1:
        raise RecipeError(f"--workers {workers}: expected at least 1.")
    if serial and name is None and workers is None:
        workers = 1
    with executors[name or "local"].function(workers, most) as found:
        yield found
