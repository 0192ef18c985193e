"""Cells of a study: run those that have no result yet, and write each as it comes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import git

from modicum.record import environment, write_atomic

RESULTS = Path(__file__).parents[2] / "results"
Cell = tuple[str, int, int]  # variant, seed, steps


def arguments(description: str | None, *, steps: int) -> argparse.Namespace:
    """Read the command line that all studies have."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=8.0)
    return parser.parse_args()


def run(
    name: str,
    about: dict[str, Any],
    wanted: Iterable[Cell],
    measure: Callable[[str, int, int], dict[str, Any]],
    *,
    minutes: float,
) -> None:
    """Measure the cells that ``name`` does not hold, as many as begin within ``minutes``."""
    torch.set_num_threads(1)
    path = RESULTS / name
    record = about | {"cells": json.loads(path.read_text())["cells"] if path.exists() else []}
    done = {(c["variant"], c["seed"], c["steps"]) for c in record["cells"]}
    todo = [cell for cell in dict.fromkeys(wanted) if cell not in done]
    begin = time.monotonic()
    while todo and time.monotonic() - begin < 60 * minutes:
        variant, seed, steps = todo.pop(0)
        wall, processor = time.perf_counter(), time.process_time()
        found = {"variant": variant, "seed": seed, "steps": steps} | measure(variant, seed, steps)
        found["seconds"] = {
            "wall": round(time.perf_counter() - wall, 1),
            "processor": round(time.process_time() - processor, 1),
        }
        found["when"] = datetime.now(UTC).isoformat(timespec="seconds")
        found |= {"commit": git("rev-parse", "HEAD"), "environment": environment()}
        record["cells"].append(found)
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, json.dumps(record, indent=1) + "\n")
        print(json.dumps({k: v for k, v in found.items() if k not in ("environment", "exits")}), flush=True)
    print(f"{len(todo)} cells are left" if todo else "every cell has a result")
