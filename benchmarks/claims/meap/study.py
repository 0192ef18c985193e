"""Run the cells that have no result yet: python benchmarks/claims/meap/study.py STUDY [--minutes 7].

Run it again to go on; the result file grows by one cell at a time and finished cells are never run again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
WORKERS = {"epochs": 2, "recall": 2, "smollm2": 1}  # cells side by side; the last uses all cores for one
sys.path.insert(0, str(HERE))


def cell(study: str, arm: str, seed: int) -> dict[str, Any]:
    """Run one cell."""
    import torch

    torch.set_num_threads(1 if WORKERS[study] > 1 else len(os.sched_getaffinity(0)))
    started = time.perf_counter()
    # Models that cells are compared with lie under their sizes, so that none of another size is taken.
    scratch = Path(tempfile.gettempdir()) / "modicum-meap" / study / "-".join(map(str, constants(study).values()))
    found = import_module(study).run(arm, seed, scratch)
    seconds = round(time.perf_counter() - started, 1)
    return {"arm": arm, "seed": seed, "seconds": seconds, "constants": constants(study), **found}


def main() -> None:
    """Run cells until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=WORKERS)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    path = RESULTS / f"meap_{options.study}.json"
    cells = json.loads(path.read_text())["cells"] if path.exists() else []
    # Cells of other sizes are another study: they are run again rather than mixed in.
    cells = [c for c in cells if c["constants"] == constants(options.study)]
    done = {(c["arm"], c["seed"]) for c in cells}
    wanted = [(arm, seed) for arm in import_module(options.study).ARMS for seed in range(options.seeds)]
    todo = [pair for pair in wanted if pair not in done]
    deadline, longest = time.monotonic() + 60 * options.minutes, 0.0
    with ProcessPoolExecutor(WORKERS[options.study]) as pool:
        running = {}
        while running or todo:
            while todo and len(running) < WORKERS[options.study] and time.monotonic() + longest < deadline:
                arm, seed = todo.pop(0)
                running[pool.submit(cell, options.study, arm, seed)] = None
            if not running:
                break
            future = next(as_completed(running))
            running.pop(future)
            found = future.result()
            longest = max(longest, found["seconds"])
            cells.append(found)
            save(path, options.study, cells)
            print(found["arm"], found["seed"], f"{found['seconds']} s", flush=True)
    print(f"{len(cells)} of {len(wanted)} cells done")


def constants(study: str) -> dict[str, int]:
    """Return the sizes that a study was run with."""
    return {key: value for key, value in vars(import_module(study)).items() if key.isupper() and type(value) is int}


def save(path: Path, study: str, cells: list[dict[str, Any]]) -> None:
    """Write the results with what they depend on."""
    from modicum.record import environment, write_atomic

    module = import_module(study)
    found = {
        "study": study,
        "about": (module.__doc__ or "").strip(),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--", "src", "benchmarks/claims/meap")),
        "environment": environment(),
        "cells": sorted(cells, key=lambda c: (list(module.ARMS).index(c["arm"]), c["seed"])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found, indent=1) + "\n")


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", "-C", str(HERE), *command], capture_output=True, text=True, check=False
    ).stdout.strip()


if __name__ == "__main__":
    main()
