"""Run stages that use each other, several at a time where an executor has room for them.

A stage starts once what it uses is finished. One that fails keeps those that use it from starting, and no others; its
error is raised at the end. A stage that another process works on is waited for, and taken over when that process dies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modicum.errors import ModicumError
from modicum.jobs import open_run, settle
from modicum.jobs.executors import DONE, Executor, LostError, Task
from modicum.jobs.stages.references import names_in, resolve
from modicum.recipe import parse
from modicum.record import Run, read_record
from modicum.report.text import duration

EVERY = 0.2  # seconds between two looks at a stage that another process works on
TRIES = 2  # of a stage whose process was lost


@dataclass(frozen=True)
class Stage:
    """A recipe that waits for what it uses.

    Attributes:
        name: Of its folder.
        recipe: With references to other stages.
        title: For people.
        after: Stages that must be finished first, beside those that the recipe uses.
        pick: Gives, once all of ``after`` is finished, the stage that this one only stands for; it runs nothing itself.
        resources: What an executor on several machines asks for.
    """

    name: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    after: tuple[str, ...] = ()
    pick: Callable[[Mapping[str, Path]], str] | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> list[str]:
        """All stages that must be finished first."""
        return list(dict.fromkeys((*self.after, *names_in(self.recipe))))


class StageError(ModicumError):
    """A stage cannot be finished: its own error, and whose it is."""


def run_stages(
    stages: Sequence[Stage],
    run: Run,
    executor: Executor,
    *,
    tell: Callable[[Stage, Mapping[str, Any]], None] = lambda *_: None,
    shared: bool = False,
) -> dict[str, Path]:
    """Run all stages; return the folder of each.

    Args:
        stages: In an order in which each could run.
        run: Whose folder holds them.
        executor: Where they run.
        tell: Given each stage when it is finished, with its record.
        shared: Other processes may run stages of this folder at the same time.

    Raises:
        StageError: A stage failed because of the user's input; all others that could run did.
        RuntimeError: A stage failed in another way.
    """
    return _Course(stages, run, executor, tell, shared).run_all()


class _Course:
    """The state of :func:`run_stages`: what waits, what is at work, what is finished and what failed."""

    def __init__(
        self, stages: Sequence[Stage], run: Run, executor: Executor, tell: Callable[..., None], shared: bool
    ) -> None:
        self.run, self.executor, self.tell, self.shared = run, executor, tell, shared
        self.waiting = {stage.name: stage for stage in stages}
        self.total = sum(stage.pick is None for stage in stages)
        self.at_work: dict[Future[str], Stage] = {}
        self.held: dict[str, float] = {}  # when to look again at stages that others work on
        self.losses: dict[str, int] = {}
        self.folders: dict[str, Path] = {}
        self.failed: dict[str, BaseException] = {}
        self.began, self.done_here, self.count = time.monotonic(), 0, 0

    def run_all(self) -> dict[str, Path]:
        while self.waiting or self.at_work:
            self._start_what_can_start()
            if self.at_work:
                finished, _ = wait(self.at_work, timeout=EVERY if self.held else None, return_when=FIRST_COMPLETED)
                for future in finished:
                    self._take(self.at_work.pop(future), future)
            elif self.held:
                time.sleep(EVERY)
            elif not self._can_go_on():
                break
        for name, error in self.failed.items():
            if isinstance(error, ModicumError):
                raise StageError(f"{name}: {error}") from None
            raise error
        return self.folders

    def _can_go_on(self) -> bool:
        return any(set(stage.needs) <= self.folders.keys() for stage in self.waiting.values())

    def _start_what_can_start(self) -> None:
        for stage in list(self.waiting.values()):
            if len(self.at_work) >= self.executor.slots:
                return
            if self.held.get(stage.name, 0.0) > time.monotonic() or not set(stage.needs) <= self.folders.keys():
                continue
            if stage.pick is not None:
                del self.waiting[stage.name]
                self._picked(stage)
                continue
            try:
                if self._finished_before(stage):
                    continue
                task = self._task(stage)
            except Exception as error:  # of this stage alone; the others go on
                self._fail(stage, error)
                continue
            del self.waiting[stage.name]
            self.at_work[self.executor.submit(task)] = stage

    def _picked(self, stage: Stage) -> None:
        assert stage.pick is not None  # noqa: S101 - for mypy
        try:
            self.folders[stage.name] = self.folders[stage.pick(self.folders)]
        except ModicumError as error:
            self.failed[stage.title or stage.name] = error

    def _folder(self, stage: Stage) -> Path:
        return self.run.folder / "stages" / stage.name

    def _recipe(self, stage: Stage) -> dict[str, Any]:
        resolved: dict[str, Any] = resolve(stage.recipe, self.folders)
        return resolved

    def _finished_before(self, stage: Stage) -> bool:
        folder = self._folder(stage)
        if not (folder / "record.json").is_file():
            return False
        known = open_run(parse(self._recipe(stage), stage.title), folder, quiet=True, on_change="keep")
        if not known.finished():
            return False
        settle(folder)
        del self.waiting[stage.name]
        self._finish(stage, again=stage.name in self.held)
        return True

    def _task(self, stage: Stage) -> Task:
        recipe = self._recipe(stage)
        parse(recipe, stage.title)  # refused here, before a worker starts
        folder = self._folder(stage)
        claims = folder.parent if self.shared else None
        quiet = self.run.quiet or self.executor.slots > 1  # lines of several stages would mix
        return Task(stage.name, recipe, folder, claims, quiet=quiet, resources=stage.resources)

    def _take(self, stage: Stage, future: Future[str]) -> None:
        """Look at what came of a stage that an executor was given."""
        error = future.exception()
        if isinstance(error, LostError):
            self.losses[stage.name] = self.losses.get(stage.name, 0) + 1
            if self.losses[stage.name] < TRIES:
                self.run.say(f"{stage.title}: {error} It is started again.")
                self.waiting = {stage.name: stage, **self.waiting}
                return
        if error is not None:
            self._fail(stage, error)
        elif future.result() == DONE:
            self._finish(stage, seconds=True)
        else:  # another process works on it
            if stage.name not in self.held:
                self.run.say(f"{stage.title}: {future.result()}")
            self.held[stage.name] = time.monotonic() + EVERY
            self.waiting[stage.name] = stage

    def _fail(self, stage: Stage, error: BaseException) -> None:
        self.waiting.pop(stage.name, None)
        self.failed[stage.title or stage.name] = error
        self.run.say(f"{stage.title} failed: {error}")

    def _finish(self, stage: Stage, *, seconds: bool = False, again: bool = False) -> None:
        folder = self._folder(stage)
        self.folders[stage.name] = folder
        self.held.pop(stage.name, None)
        record = read_record(folder)
        self.count += 1
        self.done_here += seconds or again
        if seconds or again:
            self.run.say(
                f"[{self.count}/{self.total}] {stage.title}: done in {duration(record['seconds'])}{self._left()}"
            )
        self.tell(stage, record)

    def _left(self) -> str:
        """Say how long the rest may take, by the pace so far."""
        left = self.total - self.count - sum(name in self.failed for name in self.waiting)
        if not left or not self.done_here:
            return ""
        return f", about {duration(left * (time.monotonic() - self.began) / self.done_here)} left"
