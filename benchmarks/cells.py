"""Cells of a study, in the results that are committed; see :mod:`modicum.cells`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from benchmarks.provenance import origin
from benchmarks.tables import RESULTS

from modicum.cells import Cell, Document, once

Recall: TypeAlias = Callable[[str, Callable[[], Cell]], Cell | None]


def resumable(study: str, *, minutes: float, about: Mapping[str, Any] | None = None) -> Recall:
    """Return a function that gives a cell's result: stored, or measured and stored, or none when the time is up.

    Args:
        study: Name of the result file.
        minutes: No cell is begun after so many.
        about: What all cells were measured with. Cells of other sizes are another study: they are not mixed in.
    """
    until = time.monotonic() + 60 * minutes
    store = Document(RESULTS / f"{study}.json", about or {})

    def recall(key: str, measure: Callable[[], Cell]) -> Cell | None:
        if key in store:
            return store[key]
        if time.monotonic() > until:
            return None

        def dated() -> Cell:
            return measure() | {"when": datetime.now(UTC).isoformat(timespec="seconds")} | origin()

        cell = once(store, key, dated) or {}
        shown = {k: v for k, v in cell.items() if isinstance(v, (int, float, bool)) or v is None}
        print(key, shown, flush=True)
        return cell

    return recall


def measure_all(recall: Recall, wanted: Mapping[str, Callable[[], Cell]]) -> bool:
    """Measure the cells that have no result yet, say how many are left, and return whether none is."""
    left = [key for key, measure in wanted.items() if recall(key, measure) is None]
    print(f"{len(left)} cells are left; run again" if left else "every cell has a result")
    return not left
