"""Counts of a campaign in one committed JSON file: a run of the same seed goes on, another seed adds to it.

Runs of several seeds may go on at one time.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MOST = 50  # of what was wrong is kept in words


class Tally:
    """What has been tried so far.

    Args:
        path: The file.
        seed: Of the campaign.
        every: After how many attempts the counts are written.
        resume: Go on where the last run of this seed ended; else count what is tried now alone, and write nothing.
    """

    def __init__(self, path: Path, seed: int | str, *, resume: bool = True, every: int = 50) -> None:
        self.path, self.key, self._keep, self._every = path, str(seed), resume, every
        self._began = time.monotonic()
        known = self._read() if resume else {}
        mine = known.get(self.key, {"next": 0, "ends": {}, "seconds": 0.0, "slowest": 0.0, "wrong": []})
        self.done: int = mine["next"]
        self.wrong: list[str] = []
        self._mine = mine

    def add(self, end: str, seconds: float, number: int, wrong: str | None) -> None:
        """Count one attempt: how it ended, and what was wrong with it."""
        end = "wrong" if wrong else end
        wrong = wrong and wrong.replace(sys.prefix, "…")  # where this machine keeps its libraries tells nobody anything
        self._mine["ends"][end] = self._mine["ends"].get(end, 0) + 1
        self._mine["slowest"] = max(self._mine["slowest"], round(seconds, 2))
        self._mine["next"] = self.done = number + 1
        if wrong:
            self.wrong.append(wrong)
            self._mine["wrong"] = [*self._mine["wrong"], wrong][-MOST:]
        if self._keep and sum(self._mine["ends"].values()) % self._every == 0:
            self.write()

    def write(self) -> None:
        """Write the counts, with the machine and the commit that they belong to."""
        if not self._keep:
            return
        from benchmarks.provenance import origin

        from modicum.durable import write_atomic
        from modicum.environment import environment

        now = time.monotonic()
        self._mine["seconds"] = round(self._mine["seconds"] + now - self._began, 1)
        self._began = now
        self._mine |= {"environment": environment(), **origin()}
        with _alone(self.path.parent):
            seeds = self._read() | {self.key: self._mine}
            total: dict[str, int] = {}
            for one in seeds.values():
                for end, count in one["ends"].items():
                    total[end] = total.get(end, 0) + count
            content = {"total": sum(total.values()), "ends": total, "seeds": seeds}
            write_atomic(self.path, json.dumps(content, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.path.read_text())["seeds"] if self.path.exists() else {}
        return found

    def told(self) -> str:
        """Return the counts in words."""
        ends = self._mine["ends"]
        return f"{sum(ends.values())} tried: " + ", ".join(f"{count} {end}" for end, count in sorted(ends.items()))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)
