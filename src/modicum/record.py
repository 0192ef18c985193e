"""A run is a folder: the resolved recipe, what came of it, and a log that grows while it works.

::

    run/
      recipe.yaml     resolved: `modicum run run/recipe.yaml` repeats it
      record.json     job, status, versions, hash of the recipe and its inputs, metrics, outputs and their hashes, notes
      log.jsonl       one JSON object a line: {"event": "train", "step": 10, "loss": 1.2, ...}
      …               what the job made: model/, adapter/, stages/NAME/ (each stage is a run again)

A run whose record says ``done`` under the same hash, and whose outputs are what the record says, is finished: running
it again does nothing. While a run works, the hidden file ``.lock`` in its folder refuses a second one
(:mod:`modicum.lock`). When several processes share a run (``torchrun``, ``accelerate launch``), only the first one
writes to its folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import yaml

from modicum import lock, processes
from modicum.borders import MALFORMED, check_name, expanded
from modicum.content import fingerprint as fingerprint
from modicum.content import hash_files, is_old, old_fingerprint
from modicum.credentials import redact
from modicum.documents import stored_yaml
from modicum.durable import follow_umask as follow_umask
from modicum.durable import keep_aside, remove
from modicum.durable import whole_folder as whole_folder
from modicum.durable import write_atomic as write_atomic
from modicum.environment import environment
from modicum.errors import CheckpointError, ModicumError, printable, shortened
from modicum.inputs import Inputs
from modicum.stored import ADDED, damage, difference, end_last_line, outputs_in
from modicum.stored import read_lines as read_lines
from modicum.stored import read_log as read_log
from modicum.stored import read_record as read_record

NUMERICS = 1  # raised whenever the same recipe and inputs give other numbers than before
ASIDE = "set-aside"
PATIENCE = 5.0  # seconds in which a folder that was just taken gets its record
OnChange: TypeAlias = Literal["refuse", "replace", "keep"]


def digest(value: object) -> str:
    """Hash a JSON-like value, whatever the order of its keys.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(job: str, recipe: Mapping[str, Any], inputs: Mapping[str, str], numerics: int | None = NUMERICS) -> str:
    """Hash what makes a run the run it is: its job, its resolved recipe but for the folder, its inputs, the numerics.

    Records of version 0.1.0 name no numerics: ``None`` gives their hash.
    """
    kept = {key: value for key, value in recipe.items() if key != "out"}
    made_with = {} if numerics is None else {"numerics": numerics}
    return digest({"job": job, "recipe": kept, "inputs": dict(inputs)} | made_with)


class Run:
    """An open run folder: where a job writes its results, notes and log.

    Args:
        folder: The run folder; made when it is not there.
        job: Name of the job, for the record.
        recipe: The resolved recipe as plain data.
        inputs: What the recipe's references stand for; see :func:`modicum.inputs.look`.
        quiet: Print nothing.
        on_change: What to do when the folder holds the run of another recipe: refuse, start over in an empty folder,
            or keep what is there, for jobs that find out themselves what can be kept.
        complete: Completes a recipe by today's defaults. A run of an earlier version, whose recipe lacks a key that
            has been added since, is recognised by it.
        home: Where the folder will lie once the run is done, when that is elsewhere.
        shared: While another process has this very run at work, help it rather than refuse.

    Attributes:
        foreign: The folder held the run of another recipe, or of other inputs, when its record was read.
        helps: Another process has the run, and writes its record.
        on: Executor of the run's stages, where the command line names one.
        workers: How many of them run at a time, where it says so.

    Raises:
        CheckpointError: The folder holds something else; or, when the run is entered, another process works in it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        job: str,
        recipe: Mapping[str, Any],
        inputs: Inputs | Mapping[str, str] | None = None,
        quiet: bool = False,
        on_change: OnChange = "refuse",
        complete: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
        home: str | Path | None = None,
        shared: bool = False,
    ) -> None:
        check_name(folder)
        self._shared, self.helps = shared, False
        self.on: str | None = None
        self.workers: int | None = None
        self.folder, self.home = Path(folder), Path(home or folder)
        self.main = processes.main()
        self.quiet = quiet or not self.main
        self.inputs = inputs if isinstance(inputs, Inputs) else Inputs(dict(inputs or {}))
        self.hash = identity(job, recipe, self.inputs.hashes)
        self._complete = complete
        self._recipe, self._job, self._on_change = dict(recipe), job, on_change
        self._held = ExitStack()
        self._loose: set[str] = set()
        self.record: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        """Return the record of this very run as it stands in the folder, or that of a new one."""
        return {
            "job": self._job,
            "hash": self.hash,
            "status": "new",
            "inputs": dict(self.inputs.hashes),
            "metrics": {},
            "outputs": {},
            "notes": [],
            "seconds": 0.0,
        } | (self._previous() or {})

    def _previous(self) -> dict[str, Any] | None:
        # Both are told by one look: another process of this launch may fill the folder a moment later.
        files, self.foreign = self._files(), False
        if not files:
            return None
        if not (self.folder / "record.json").exists():
            raise CheckpointError(f"{self.folder} is not empty and not a run. Choose another --out.")
        previous = read_record(self.folder)
        difference = self._difference(previous)
        if difference is None:
            return previous
        self.foreign = True
        if self._on_change == "refuse":
            raise CheckpointError(
                f"{self.folder} holds the run of another recipe or of other inputs ({difference}). "
                "Choose another --out, or delete the folder."
            )
        return None

    def _difference(self, previous: dict[str, Any]) -> str | None:
        """Say in what a record is not of this run; ``None`` where it is.

        It is also where an earlier version wrote it, once its recipe has today's defaults.
        """
        if previous.get("hash") == self.hash:
            return None
        other = "its recipe.yaml was changed since, or is of another job"
        try:
            recipe = stored_yaml(self.folder / "recipe.yaml")
            job, inputs, numerics = previous["job"], previous["inputs"], previous.get("numerics")
            # A recipe that was edited afterwards tells nothing about what ran.
            if identity(job, recipe, inputs, numerics) != previous["hash"] or job != self._job:
                return other
            if identity(job, theirs := self._complete(recipe), {}) != identity(job, self._recipe, {}):
                return difference(theirs, self._recipe) or other
            names = inputs if numerics is None else {**inputs, **self.inputs.hashes}
            differing = [name for name in names if not self._is_input(name, inputs.get(name), numerics is None)]
        except MALFORMED:
            return other
        if (numerics or 1) != NUMERICS:
            return "this version of modicum computes other numbers"
        return f"input {differing[0]} is not what it was" if differing else None

    def _is_input(self, name: str, known: str | None, old: bool) -> bool:
        now = self.inputs.hashes.get(name)
        if now == known or (old and known == name):
            return True
        return old and known is not None and is_old(known) and old_fingerprint(expanded(name)) == known

    def _files(self) -> set[str]:
        # Hidden names are what a killed process was still writing.
        try:
            return {p.name for p in self.folder.iterdir() if not p.name.startswith(".")}
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise CheckpointError(f"Cannot use {self.folder}: {error.strerror}. Choose another --out.") from None

    @property
    def done(self) -> bool:
        """Whether this very run finished before."""
        return bool(self.record["status"] == "done")

    def finished(self) -> bool:
        """Whether the folder holds this very run, done and whole, by now: another process may have worked on it."""
        try:
            record = self._read()
            return bool(record["status"] == "done") and not damage(self.folder, record)
        except CheckpointError:
            return False

    def __enter__(self) -> Self:
        try:
            if self.main:
                self._take_folder()
            else:
                if self._on_change == "replace":
                    lock.wait(self._is_ours, self.folder / lock.NAME, f"emptying {self.folder}")
                self._begin()
        except OSError as error:
            raise CheckpointError(f"Cannot write to {self.folder}: {error.strerror}. Choose another --out.") from None
        return self

    def _take_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(lock.hold(self.folder / lock.NAME, self.folder))
            except lock.HeldError:
                if not self._shared or not self._is_at_work():
                    raise
                self.main, self.helps = False, True
                self._begin()
                return
            # Another process may have worked here since the record was read.
            self.record = self._read()
            lock.remove_leftovers(self.folder)
            if self.record["status"] == "new" and self._on_change == "replace":
                self._empty()
            end_last_line(self.folder / "log.jsonl")  # what is logged next would be one line with it, and none
            if self.done and (damaged := damage(self.folder, {**self.record, "lacks": {}})):
                self._set_aside(damaged)
            self._begin()
            text = yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True)
            write_atomic(self.folder / "recipe.yaml", text)
            self._held = stack.pop_all()

    def tidy(self) -> None:
        """Remove what a process left that was killed when all but its lock was done."""
        if self.main and (self.folder / lock.NAME).exists():
            with suppress(CheckpointError, OSError), lock.hold(self.folder / lock.NAME, self.folder):
                lock.remove_leftovers(self.folder)

    def _begin(self) -> None:
        self._started = time.monotonic()
        # A record of an earlier version becomes one of this version.
        self.record.update(hash=self.hash, inputs=dict(self.inputs.hashes), numerics=NUMERICS)
        for text in self.record.pop("lacks", {}).values():  # it is made good now, or told of again
            self.record["notes"] = [note for note in self.record["notes"] if note != text]
        self.record.update(status="running", environment=environment())
        self.save()

    def _set_aside(self, damaged: Mapping[str, str]) -> None:
        """Move what is not as the record says out of the way, and say so: it may be somebody's work."""
        for name, problem in damaged.items():
            own = name in self.record.get("files", ()) or (problem == ADDED and not name.startswith("stages/"))
            if own and os.path.lexists(path := self.folder / name):  # a stage sees to its own
                keep_aside(path, self.folder / ASIDE, name)
        told = ", ".join(f"{name} {problem}" for name, problem in list(damaged.items())[:3])
        more = f" and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        self.note(f"made again, since after the run was done {told}{more}; what was there is kept in {ASIDE}/")

    def _is_at_work(self) -> bool:
        """Whether whoever holds the folder has this very run at work, in another process."""
        owner = lock.read_owner(self.folder / lock.NAME)
        if owner is not None and owner.pid == os.getpid() and owner.alive():
            return False
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:  # the record is written a moment after the folder is taken
            with suppress(CheckpointError):
                if self._difference(read_record(self.folder)) is None:
                    return True
            time.sleep(0.1)
        return False

    def _is_ours(self) -> bool:
        """Whether the folder holds nothing of another run, which the first process is about to remove."""
        try:
            return self._difference(read_record(self.folder)) is None
        except CheckpointError:
            return True  # the folder is empty, or of another machine that shares no disk with the first process

    def _empty(self) -> None:
        # The record goes last: without it, what a killed process left here would be nobody's.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "record.json"):
            if path.name == lock.NAME:
                continue
            remove(path)

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        with self._held:
            self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self._started, 3)
            stopped = isinstance(error, KeyboardInterrupt)
            self.record["status"] = "done" if error is None else "interrupted" if stopped else "failed"
            self.record.pop("error", None)
            if error is not None and not stopped:
                known = isinstance(error, ModicumError)
                self.record["error"] = redact(shortened(str(error) if known else f"{type(error).__name__}: {error}"))
            if error is None and self.main:
                self.record["files"] = self._hashes()
            with suppress(OSError) if error is not None else nullcontext():
                self.save()  # a full disk is what the error tells of already
            # A run that the user's input stopped before it made anything leaves no folder to trip over.
            if self.main and isinstance(error, ModicumError) and not self._made_something():
                self._empty()
                shutil.rmtree(self.folder)

    def _made_something(self) -> bool:
        # An unfinished folder counts: what is finished in it is used once the input is mended.
        own = {"record.json", "recipe.yaml", lock.NAME}
        return any(path.name not in own for path in self.folder.iterdir())

    def _hashes(self) -> dict[str, list[Any]]:
        """Return size and hash of every file among the outputs."""
        paths = [self.folder / path for name, path in self.record["outputs"].items() if name not in self._loose]
        files = [file for path in paths if path.exists() for file in outputs_in(path)]
        found = hash_files(files)
        return {str(file.relative_to(self.folder)): [file.stat().st_size, found[file]] for file in files}

    def save(self) -> None:
        """Write the record as it stands."""
        if self.main:
            write_atomic(self.folder / "record.json", _json(self.record, indent=2, ensure_ascii=False) + "\n")

    def log(self, event: str, **values: Any) -> None:
        """Append one line to the log."""
        if not self.main:
            return
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            line = {"event": event, "time": round(time.time(), 3), **redact(values, names=False)}
            file.write(_json(line) + "\n")

    def note(self, text: str, *, lacks: str = "") -> None:
        """Keep (and say) what the user should know; ``lacks`` names what a done run asks for again when run again."""
        text = redact(text)
        if lacks:
            self.record.setdefault("lacks", {})[lacks] = text
        if lacks or text not in self.record["notes"]:
            self.record["notes"] = list(dict.fromkeys([*self.record["notes"], text]))
            self.save()
        self.say(f"note: {text}")

    def say(self, text: str) -> None:
        """Print a line to the terminal's error stream, so that standard output stays clean for results."""
        if not self.quiet:
            print(printable(redact(text)), file=sys.stderr, flush=True)

    def output(self, name: str, path: Path, *, kept: bool = True) -> None:
        """Name something that the run made; the first is what other stages get.

        Args:
            name: How other stages call it.
            path: The file or folder, inside the run's.
            kept: The run is not done any more once it is changed or removed.
        """
        self.record["outputs"][name] = str(path.relative_to(self.folder))
        if not kept:
            self._loose.add(name)
        self.save()


def _json(value: Any, **style: Any) -> str:
    """Return JSON as every reader takes it: ``null`` for numbers that are not finite, which JSON does not know."""
    try:
        return json.dumps(value, allow_nan=False, **style)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **style)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
