"""Where results go: one JSON file, written by the run, with what it ran on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import torch

from modicum.record import environment, write_atomic

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "benchmarks" / "results"

Cell: TypeAlias = dict[str, Any]


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME.json`` and say so."""
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "status", "--porcelain", "src/modicum/adapters", "benchmarks/claims/hrp", "benchmarks/speed/hrp.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    origin = {"commit": head.stdout.strip() or None, "dirty": bool(dirty.stdout.strip())}
    record = origin | {"environment": environment()} | result
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_atomic(RESULTS / f"{name}.json", json.dumps(record, indent=1) + "\n")
    print(f"wrote {RESULTS / name}.json")


def read_result(name: str) -> dict[str, Any]:
    """Return what an earlier run wrote, so that finished cells are skipped; nothing when there is no file."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def run_cells(
    name: str, cells: Iterable[Cell], work: Callable[[Cell], dict[str, Any]], *, budget: float, workers: int = 2
) -> None:
    """Run the cells that have no result yet, one thread each, until ``budget`` seconds have passed; then save."""
    done = read_result(name).get("cells", {})
    open_cells = [cell for cell in cells if json.dumps(cell, sort_keys=True) not in done]
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
                key = json.dumps(waiting.pop(future), sort_keys=True)
                done[key] = future.result()
                print(key, done[key], flush=True)
            if time.monotonic() - saved > 10:  # a killed study keeps what it has
                write_result(name, {"cells": done})
                saved = time.monotonic()
    left = len(open_cells) - sum(json.dumps(cell, sort_keys=True) in done for cell in open_cells)
    print(f"{left} cells are left" + ("; run again." if left else "."))
    write_result(name, {"cells": done})


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half width of its 95 % Student-t interval."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, float("nan")
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, float(stats.t.ppf(0.975, len(values) - 1)) * (variance / len(values)) ** 0.5
