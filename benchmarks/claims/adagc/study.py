"""Run the cells of the fault study that have no result yet: python -m benchmarks.claims.adagc.study [--minutes 7].

Run it again to go on; the result file grows by one cell at a time and finished cells are never run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from benchmarks.provenance import git

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "results" / "adagc-faults.json"
sys.path.insert(0, str(HERE))

ARMS = {
    "none": (None, {}),
    "global": ("global_norm", {}),
    "global 0.3": ("global_norm", {"limit": 0.3}),
    "global 0.1": ("global_norm", {"limit": 0.1}),
    "zclip": ("zclip", {}),
    "adagc min (published)": ("adagc", {"init": "min", "ignore_zero": False}),
    "adagc ema (default)": ("adagc", {}),
    "adagc mean": ("adagc", {"init": "mean"}),
    "adagc ema, relative 1.5": ("adagc", {"relative": 1.5}),
    "adagc min, warmup 300": ("adagc", {"init": "min", "warmup": 300}),
    "adagc ema, warmup 300": ("adagc", {"warmup": 300}),
    "adagc global": ("adagc", {"granularity": "global"}),
    "value 1e-3": ("value", {"limit": 1e-3}),
    "fixed norm 0.1": ("fixed_norm", {"limit": 0.1}),
    "agc": ("agc", {}),
    "agc update": ("agc_update", {}),
    "clippy": ("clippy", {}),
    "autoclip": ("autoclip", {}),
    "skip step": ("skip_step", {}),
    "spam": ("spam", {}),
    "stable spam": ("stable_spam", {}),
    "stable adamw": ("stable_adamw", {}),
    "adafactor clip": ("adafactor", {}),
    "aggc": ("aggc", {"steps": 1000}),
}
MAIN = ["none", "global", "zclip", "adagc min (published)", "adagc ema (default)"]
# The baseline's threshold is tried at three values, AdaGC's factor at two, so that neither is judged by its default.
TUNED = ["global 0.3", "global 0.1", "adagc ema, relative 1.5"]
GRID = [
    *[("adamw0.999", arm) for arm in (*MAIN, *TUNED)],
    *[(optimizer, arm) for optimizer in ("lion", "muon") for arm in ("none", "global", "adagc ema (default)")],
    *[("adamw0.999", arm) for arm in ("adagc ema, warmup 300", "adagc mean")],
    *[(optimizer, "adagc min (published)") for optimizer in ("lion", "muon", "adamw0.95")],
    *[("adamw0.95", arm) for arm in ("none", "global", "adagc ema (default)")],
    *[("adamw0.999", arm) for arm in ARMS],
]


def cells(seeds: int) -> list[tuple[str, str, bool, int]]:
    """Return all cells, those of the main table first."""
    return [
        (opt, arm, faults, seed)
        for opt, arm in dict.fromkeys(GRID)
        for faults in (False, True)
        for seed in range(seeds)
    ]


def key(cell: tuple[str, str, bool, int]) -> str:
    optimizer, arm, faults, seed = cell
    return f"{optimizer} | {arm} | {'faults' if faults else 'clean'} | {seed}"


def work(cell: tuple[str, str, bool, int]) -> dict:
    import torch
    from benchmarks.claims.adagc.byte_model import run

    torch.set_num_threads(1)
    optimizer, arm, faults, seed = cell
    rule, knobs = ARMS[arm]
    began = time.monotonic()
    found = run(optimizer, rule, knobs, faults=faults, seed=seed)
    return {
        "optimizer": optimizer, "arm": arm, "rule": rule, "knobs": knobs, "with_faults": faults, "seed": seed,
        **found, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=3)
    given = parser.parse_args()
    from modicum.record import environment, write_atomic

    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"study": "adagc-faults", "cells": {}}
    todo = [cell for cell in cells(given.seeds) if key(cell) not in data["cells"]]
    commit = git("rev-parse", "--short", "HEAD")
    began = time.monotonic()
    with ProcessPoolExecutor(given.workers) as pool:
        while todo and time.monotonic() - began < 60 * given.minutes:
            now, todo = todo[: given.workers], todo[given.workers :]
            for cell, found in zip(now, pool.map(work, now)):
                data["cells"][key(cell)] = found | {"commit": commit}
                print(key(cell), found["held_out_loss"], found["seconds"], flush=True)
            data["environment"] = environment()
            write_atomic(RESULTS, json.dumps(data, indent=1) + "\n")
    print(f"{len(data['cells'])} cells done, {len(todo)} to do")


if __name__ == "__main__":
    main()
