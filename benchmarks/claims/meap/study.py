"""Run the cells that have no result yet: python -m benchmarks.claims.meap.study STUDY [--minutes 7].

Run it again to go on; the result file grows by one cell at a time and finished cells are never run again.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.provenance import git

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results"
STUDIES = ("epochs", "recall", "smollm2")


def main() -> None:
    """Run cells until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    path = RESULTS / f"meap_{options.study}.json"
    cells = json.loads(path.read_text())["cells"] if path.exists() else []
    module = import_module(f"benchmarks.claims.meap.{options.study}")
    # Cells of other sizes are another study: they are run again rather than mixed in.
    cells = [c for c in cells if c["constants"] == constants(module)]
    done = {(c["arm"], c["seed"]) for c in cells}
    wanted = [(arm, seed) for seed in range(options.seeds) for arm in module.ARMS]
    deadline, longest = time.monotonic() + 60 * options.minutes, 0.0
    for arm, seed in (pair for pair in wanted if pair not in done):
        if time.monotonic() + longest > deadline:
            break
        began = time.monotonic()
        found = module.run(arm, seed)
        seconds = round(time.monotonic() - began, 1)
        longest = max(longest, seconds)
        cells.append({"arm": arm, "seed": seed, "seconds": seconds, "constants": constants(module), **found})
        save(path, module, cells)
        print(arm, seed, f"{seconds} s", flush=True)
    print(f"{len(cells)} of {len(wanted)} cells done")


def constants(module: ModuleType) -> dict[str, Any]:
    """Return what a study is run with, as it is after a way through JSON."""
    found = {k: v for k, v in vars(module).items() if k.isupper() and isinstance(v, (int, float, str, tuple))}
    return dict(json.loads(json.dumps(found)))


def save(path: Path, module: ModuleType, cells: list[dict[str, Any]]) -> None:
    """Write the results with what they depend on."""
    from modicum.record import environment, write_atomic

    found = {
        "study": path.stem.removeprefix("meap_"),
        "about": (module.__doc__ or "").strip(),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "src", "benchmarks/claims/meap")),
        "environment": environment(),
        "cells": sorted(cells, key=lambda c: (list(module.ARMS).index(c["arm"]), c["seed"])),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
