"""What both studies of looped models share: their command line, and their cells by variant, seed and steps."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from benchmarks import cells

Cell = tuple[str, int, int]  # variant, seed, steps


def arguments(description: str | None, *, steps: int) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0)
    return parser.parse_args()


def measure_all(
    study: str,
    about: dict[str, Any],
    wanted: Iterable[Cell],
    measure: Callable[[str, int, int], dict[str, Any]],
    *,
    minutes: float,
) -> None:
    """Measure the cells that have no result yet, as many as begin within ``minutes``."""
    torch.set_num_threads(1)
    recall = cells.resumable(study, minutes=minutes, about=about)

    def one(cell: Cell) -> dict[str, Any]:
        return dict(zip(("variant", "seed", "steps"), cell)) | measure(*cell)

    cells.measure_all(recall, {"|".join(map(str, cell)): partial(one, cell) for cell in wanted})
