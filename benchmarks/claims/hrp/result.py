"""What the studies of adapter starts share: how a cell is named, and the climb to a learning rate."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from benchmarks.cells import Cell, Recall, measure_all
from benchmarks.tables import load


def key_of(cell: Cell) -> str:
    """Return the name of a cell in a result file."""
    return json.dumps(cell, sort_keys=True)


def done_in(study: str) -> dict[str, Cell]:
    """Return what was measured before, by the cells' names."""
    return load(f"{study}.json").get("cells", {})


def run_cells(recall: Recall, cells: Iterable[Cell], work: Callable[[Cell], Cell]) -> bool:
    """Measure the cells that have no result yet; return whether there was time for all."""
    return measure_all(recall, {key_of(cell): partial(work, cell) for cell in cells})


def untried(ladder: Sequence[float], losses: Mapping[float, float]) -> list[float]:
    """Return the neighbours of the best learning rate that are still to be tried: none when it is bracketed.

    Example:
        >>> untried((1, 2, 3, 4), {1: 0.5, 2: 0.4}), untried((1, 2, 3, 4), {1: 0.5, 2: 0.4, 3: 0.6})
        ([3], [])
    """
    best = ladder.index(min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf))
    return [rate for rate in ladder[max(0, best - 1) : best + 2] if rate not in losses]
