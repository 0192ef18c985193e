"""Cells of a study: each is measured once and written as it comes, so that a study may be stopped and gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeAlias

from benchmarks.provenance import origin
from benchmarks.tables import RESULTS, load

from modicum.record import environment, write_atomic

Cell: TypeAlias = dict[str, Any]
Recall: TypeAlias = Callable[[str, Callable[[], Cell]], Cell | None]


def resumable(study: str, *, minutes: float, about: Mapping[str, Any] | None = None) -> Recall:
    """Return a function that gives a cell's result: stored, or measured and stored, or none when the time is up.

    Args:
        study: Name of the result file.
        minutes: No cell is begun after so many.
        about: What all cells were measured with. Cells of other sizes are another study: they are not mixed in.
    """
    until = time.monotonic() + 60 * minutes
    sizes = json.loads(json.dumps(about or {}))
    stored = load(f"{study}.json") or {"study": study, "about": sizes, "cells": {}}
    before = stored.get("about", {})
    if before != sizes:
        changed = sorted(k for k in {*before, *sizes} if before.get(k) != sizes.get(k))
        raise SystemExit(f"results/{study}.json was measured with other {', '.join(changed)}. Move it away first.")

    def recall(key: str, measure: Callable[[], Cell]) -> Cell | None:
        cells = stored["cells"]
        if key not in cells:
            if time.monotonic() > until:
                return None
            began = time.monotonic()
            found = measure()
            when = datetime.now(UTC).isoformat(timespec="seconds")
            cells[key] = {"seconds": round(time.monotonic() - began, 1)} | found | {"when": when} | origin()
            stored["environment"] = environment()
            RESULTS.mkdir(exist_ok=True)
            write_atomic(RESULTS / f"{study}.json", json.dumps(stored, indent=1) + "\n")
            shown = {k: v for k, v in cells[key].items() if isinstance(v, (int, float, bool)) or v is None}
            print(key, shown, flush=True)
        return cells[key]

    return recall


def measure_all(recall: Recall, wanted: Mapping[str, Callable[[], Cell]]) -> bool:
    """Measure the cells that have no result yet, say how many are left, and return whether none is."""
    left = [key for key, measure in wanted.items() if recall(key, measure) is None]
    print(f"{len(left)} cells are left; run again" if left else "every cell has a result")
    return not left
