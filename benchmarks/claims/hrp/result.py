"""Where results go: one JSON file, written by the run, with what it ran on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch
from benchmarks.provenance import git

from modicum.record import environment, write_atomic

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"

Cell: TypeAlias = dict[str, Any]


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` and say so."""
    own = ("src/modicum/adapters", "benchmarks/claims/hrp", "benchmarks/speed/hrp.py")
    origin = {"commit": git("rev-parse", "HEAD") or None, "dirty": bool(git("status", "--porcelain", *own))}
    record = origin | {"environment": environment()} | result
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f"{name}.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {RESULTS / name}.json")


def read_result(name: str) -> dict[str, Any]:
    """Return what an earlier run wrote, so that finished cells are skipped; nothing when there is no file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def key_of(cell: Cell) -> str:
    """Return the name of a cell in a result file."""
    return json.dumps(cell, sort_keys=True)


def untried(ladder: Sequence[float], losses: Mapping[float, float]) -> list[float]:
    """Return the neighbours of the best learning rate that are still to be tried: none when it is bracketed.

    Example:
        >>> untried((1, 2, 3, 4), {1: 0.5, 2: 0.4}), untried((1, 2, 3, 4), {1: 0.5, 2: 0.4, 3: 0.6})
        ([3], [])
    """
    best = ladder.index(min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf))
    return [rate for rate in ladder[max(0, best - 1) : best + 2] if rate not in losses]


def run_cells(
    name: str, cells: Iterable[Cell], work: Callable[[Cell], dict[str, Any]], *, budget: float, workers: int = 2
) -> None:
    """Run the cells that have no result yet, one thread each, until ``budget`` seconds have passed; then save."""
    done = read_result(name).get("cells", {})
    open_cells = [cell for cell in cells if key_of(cell) not in done]
    if not open_cells:
        return
    deadline, saved = time.monotonic() + budget, time.monotonic()
    many = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,)) if workers > 1 else None
    with many or ThreadPoolExecutor(1) as pool:
        waiting, rest = {}, iter(open_cells)
        while True:
            while len(waiting) < workers and time.monotonic() < deadline and (cell := next(rest, None)) is not None:
                waiting[pool.submit(work, cell)] = cell
            if not waiting:
                break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                key = key_of(waiting.pop(future))
                done[key] = future.result()
                print(key, done[key], flush=True)
            if time.monotonic() - saved > 10:  # a killed study keeps what it has
                write_result(name, {"cells": done})
                saved = time.monotonic()
    left = sum(key_of(cell) not in done for cell in open_cells)
    print(f"{left} cells are left" + ("; run again." if left else "."))
    write_result(name, {"cells": done})
