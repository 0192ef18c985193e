"""What is finished of a result that is being written: a line for each tensor, written once its bytes are on the disk.

Under one folder each process keeps a journal of its own. A line that is there can be relied on after a kill and after a
loss of power alike, on whichever machine; what was finished in the last moments before is made again.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from modicum.borders import loads
from modicum.durable import UNABLE

Statistics: TypeAlias = dict[str, Any]
BYTES = 32 << 20  # written at most before the disk is waited for, so that little is left to do at the end
SECONDS = 0.5  # and at most so long


class Finished:
    """The journal of one process.

    Args:
        folder: Of the unfinished result.
        rank: Which process.
        descriptors: The result's files.

    The disk is waited for by whoever calls :meth:`add`, while workers go on.
    """

    def __init__(self, folder: Path, rank: int, descriptors: Iterable[int]) -> None:
        self._path, self._descriptors = folder / f"journal.{rank}.jsonl", list(descriptors)
        self._lines: list[str] = []
        self._nbytes, self._last = 0, time.monotonic()

    def __enter__(self) -> Self:
        self._file = self._path.open("a", encoding="utf-8")
        self._file.write("\n")  # A cut-off last line is closed first, so that the next one stands on its own.
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        with self._file:
            self.flush()

    def add(self, name: str, found: Statistics, nbytes: int) -> None:
        """Note that a tensor is in its place."""
        self._lines.append(json.dumps([name, found]) + "\n")
        self._nbytes += nbytes
        if self._nbytes >= BYTES or time.monotonic() - self._last >= SECONDS:
            self.flush()

    def flush(self) -> None:
        """Wait until what was noted is on the disk, and write that down."""
        if self._lines:
            for descriptor in self._descriptors:
                to_disk(descriptor)
            self._file.writelines(self._lines)
            self._file.flush()
        self._lines, self._nbytes, self._last = [], 0, time.monotonic()


def to_disk(descriptor: int) -> None:
    """Wait until the content of an open file is on the disk, whoever wrote it."""
    try:
        getattr(os, "fdatasync", os.fsync)(descriptor)
    except OSError as error:
        if error.errno not in UNABLE:
            raise


def read_journals(folder: Path) -> dict[str, Statistics]:
    """Return what all processes have finished, by tensor."""
    found: dict[str, Statistics] = {}
    for path in folder.glob("journal.*.jsonl"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                name, statistics = loads(line)
            except (ValueError, TypeError):
                continue  # the line that was being written when the process was killed
            if isinstance(name, str) and isinstance(statistics, Mapping):
                found[name] = dict(statistics)
    return found
