"""What a search was told, kept in a file, so that a search that was killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from modicum import processes
from modicum.borders import MALFORMED, OURS, check_plain, loads
from modicum.durable import write_atomic


class Journal:
    """The answers of a search so far, in a file: a search that was killed goes on where it was.

    An averager is a pure function of what it is told, so a second run asks the same and is told the same.

    Args:
        path: The file.
        identity: What the answers depend on; those of another search are thrown away.
        check: Called before an answer is kept; what it raises, as of an input that changed, keeps it out.
    """

    def __init__(self, path: Path, identity: str, *, check: Callable[[], None] = lambda: None) -> None:
        self.path, self._asked, self._check = path, 0, check
        self._known: list[tuple[str, list[float]]] = []
        if processes.main():
            self._known = self._read(identity)
            lines = [json.dumps(identity), *map(json.dumps, self._known)]
            write_atomic(path, "\n".join(lines) + "\n")  # without a line that a kill has cut off
        self._known = processes.broadcast_object(self._known)

    def _read(self, identity: str) -> list[tuple[str, list[float]]]:
        known: list[tuple[str, list[float]]] = []
        check_plain(self.path, OURS)
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []
        if not lines or lines[0] != json.dumps(identity):
            return known
        for line in lines[1:]:
            try:
                key, numbers = loads(line)
                known.append((str(key), [float(number) for number in numbers]))
            except MALFORMED:
                break
        return known

    def answer(self, key: str, ask: Callable[[], list[float]]) -> list[float]:
        """Return the next answer: as it was, if the same was asked, or a new one."""
        place, self._asked = self._asked, self._asked + 1
        if place < len(self._known) and self._known[place][0] == key:
            return self._known[place][1]
        del self._known[place:]
        numbers = ask()
        self._check()
        self._known.append((key, numbers))
        if processes.main():
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([key, numbers]) + "\n")
        return numbers
