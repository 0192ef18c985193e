"""Run the cells of the fault study that have no result yet: python -m benchmarks.claims.adagc.study [--minutes 7].

Run it again to go on; the result file grows by one cell at a time and finished cells are never run again.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from benchmarks.cells import measure_all, resumable
from benchmarks.claims.adagc.byte_model import run

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
    optimizer, arm, faults, seed = cell
    rule, knobs = ARMS[arm]
    found = run(optimizer, rule, knobs, faults=faults, seed=seed)
    return {
        "optimizer": optimizer, "arm": arm, "rule": rule, "knobs": knobs, "with_faults": faults, "seed": seed, **found
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recall = resumable("adagc-faults", minutes=given.minutes)
    measure_all(recall, {key(cell): partial(work, cell) for cell in cells(given.seeds)})


if __name__ == "__main__":
    main()
