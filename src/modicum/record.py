"""A run is a folder: the resolved recipe, what came of it, and a log that grows while it works.

::

    run/
      recipe.yaml     resolved: `modicum run run/recipe.yaml` repeats it
      record.json     job, status, versions, hash of the recipe and its inputs, metrics, outputs, notes
      log.jsonl       one JSON object a line: {"event": "train", "step": 10, "loss": 1.2, ...}
      …               what the job made: model/, adapter/, stages/NAME/ (each stage is a run again)

A run whose record says ``done`` under the same hash is finished: running it again does nothing. While a run works, the
hidden file ``.lock`` in its folder refuses a second one (:mod:`modicum.lock`). When several processes share a run
(``torchrun``, ``accelerate launch``), only the first one writes to its folder.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import yaml

from modicum import lock, processes
from modicum.durable import follow_umask as follow_umask
from modicum.durable import whole_folder as whole_folder
from modicum.durable import write_atomic as write_atomic
from modicum.environment import environment
from modicum.errors import CheckpointError, ModicumError

OnChange: TypeAlias = Literal["refuse", "replace", "keep"]


def digest(value: object) -> str:
    """Hash a JSON-like value, whatever the order of its keys.

    Example:
        >>> digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
        True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def identity(job: str, recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash what makes a run the run it is: its job, its resolved recipe but for the folder, and its inputs."""
    kept = {key: value for key, value in recipe.items() if key != "out"}
    return digest({"job": job, "recipe": kept, "inputs": dict(inputs)})


def fingerprint(path: str | Path) -> str:
    """Hash what a file or folder holds, cheaply: names, sizes, and the content of everything under 1 MiB.

    Large files enter with their first and last 64 KiB, which for safetensors holds the header.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and _is_content(p))
    sha = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.relative_to(path) if path.is_dir() else file.name}\0{size}\0".encode())
        with file.open("rb") as handle:
            if size <= 1 << 20:
                sha.update(handle.read())
            else:
                sha.update(handle.read(1 << 16))
                handle.seek(-(1 << 16), os.SEEK_END)
                sha.update(handle.read())
    return sha.hexdigest()[:16]


def _is_content(path: Path) -> bool:
    return ".partial" not in str(path) and path.name != lock.NAME


class Run:
    """An open run folder: where a job writes its results, notes and log.

    Args:
        folder: The run folder; made when it is not there.
        job: Name of the job, for the record.
        recipe: The resolved recipe as plain data.
        inputs: Fingerprint of each input that the recipe names by path.
        quiet: Print nothing.
        on_change: What to do when the folder holds the run of another recipe: refuse, start over in an empty folder,
            or keep what is there, for jobs that find out themselves what can be kept.
        complete: Completes a recipe by today's defaults. A run of an earlier version, whose recipe lacks a key that
            has been added since, is recognised by it.

    Raises:
        CheckpointError: The folder holds something else; or, when the run is entered, another process works in it.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        job: str,
        recipe: Mapping[str, Any],
        inputs: Mapping[str, str] | None = None,
        quiet: bool = False,
        on_change: OnChange = "refuse",
        complete: Callable[[dict[str, Any]], Mapping[str, Any]] = dict,
    ) -> None:
        self.folder = Path(folder)
        self.main = processes.main()
        self.quiet = quiet or not self.main
        self.hash = identity(job, recipe, inputs or {})
        self._complete = complete
        self._recipe, self._inputs, self._job, self._on_change = dict(recipe), dict(inputs or {}), job, on_change
        self._held = ExitStack()
        self.record: dict[str, Any] = self._read()

    def _read(self) -> dict[str, Any]:
        """Return the record of this very run as it stands in the folder, or that of a new one."""
        return self._previous() or {
            "job": self._job,
            "hash": self.hash,
            "status": "new",
            "inputs": self._inputs,
            "metrics": {},
            "outputs": {},
            "notes": [],
            "seconds": 0.0,
        }

    def _previous(self) -> dict[str, Any] | None:
        if not self._files():
            return None
        if not (self.folder / "record.json").exists():
            raise CheckpointError(f"{self.folder} is not empty and not a run. Choose another --out.")
        previous = read_record(self.folder)
        if self._is_same(previous):
            return previous | {"hash": self.hash}
        if self._on_change == "refuse":
            raise CheckpointError(
                f"{self.folder} holds the run of another recipe (or its inputs changed since). "
                "Choose another --out, or delete the folder."
            )
        return None

    def _is_same(self, previous: dict[str, Any]) -> bool:
        """Whether a record is of this run; also one of an earlier version, once its recipe has today's defaults."""
        if previous.get("hash") == self.hash:
            return True
        try:
            recipe = yaml.safe_load((self.folder / "recipe.yaml").read_text(encoding="utf-8"))
            job, inputs = previous["job"], previous["inputs"]
            # A recipe that was edited afterwards tells nothing about what ran.
            if identity(job, recipe, inputs) != previous["hash"]:
                return False
            return identity(job, self._complete(recipe), inputs) == self.hash
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
            return False

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
        """Whether the folder holds this very run, done, by now: another process may have worked on it."""
        try:
            return bool(self._read()["status"] == "done")
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
            stack.enter_context(lock.hold(self.folder / lock.NAME, self.folder))
            # Another process may have worked here since the record was read.
            self.record = self._read()
            if self.record["status"] == "new" and self._on_change == "replace":
                self._empty()
            self._begin()
            text = yaml.safe_dump(self._recipe, sort_keys=False, allow_unicode=True)
            write_atomic(self.folder / "recipe.yaml", text)
            self._held = stack.pop_all()

    def _begin(self) -> None:
        self._started = time.monotonic()
        self.record.update(status="running", environment=environment())
        self.save()

    def _is_ours(self) -> bool:
        """Whether the folder holds nothing of another run, which the first process is about to remove."""
        try:
            return self._is_same(read_record(self.folder))
        except CheckpointError:
            return True  # the folder is empty, or of another machine that shares no disk with the first process

    def _empty(self) -> None:
        # The record goes last: without it, what a killed process left here would be nobody's.
        for path in sorted(self.folder.iterdir(), key=lambda path: path.name == "record.json"):
            if path.name == lock.NAME:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        with self._held:
            self.record["seconds"] = round(self.record["seconds"] + time.monotonic() - self._started, 3)
            stopped = isinstance(error, KeyboardInterrupt)
            self.record["status"] = "done" if error is None else "interrupted" if stopped else "failed"
            self.record.pop("error", None)
            if error is not None and not stopped:
                known = isinstance(error, ModicumError)
                self.record["error"] = str(error) if known else f"{type(error).__name__}: {error}"
            self.save()
            # A run that the user's input stopped before it made anything leaves no folder to trip over.
            if self.main and isinstance(error, ModicumError) and self._files() <= {"record.json", "recipe.yaml"}:
                shutil.rmtree(self.folder)

    def save(self) -> None:
        """Write the record as it stands."""
        if self.main:
            write_atomic(self.folder / "record.json", _json(self.record, indent=2, ensure_ascii=False) + "\n")

    def log(self, event: str, **values: Any) -> None:
        """Append one line to the log."""
        if not self.main:
            return
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(_json({"event": event, "time": round(time.time(), 3), **values}) + "\n")

    def note(self, text: str) -> None:
        """Keep (and say) what the user should know: a fallback taken, a default that matters."""
        if text not in self.record["notes"]:
            self.record["notes"].append(text)
            self.save()
        self.say(f"note: {text}")

    def say(self, text: str) -> None:
        """Print a line to the terminal's error stream, so that standard output stays clean for results."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def output(self, name: str, path: Path) -> None:
        """Name something that the run made, relative to its folder; the first is what other stages get."""
        self.record["outputs"][name] = str(path.relative_to(self.folder))
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


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the record of the run in ``folder``."""
    path = Path(folder) / "record.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a run: it holds no record.json.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). Delete the folder and run again.") from None
    return record


def read_log(folder: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """Return the log's lines, of one kind when ``event`` is given; a line cut off by a crash is left out."""
    lines = read_lines(Path(folder) / "log.jsonl")
    return [line for line in lines if event is None or line.get("event") == event]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, if there is one; a line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines
