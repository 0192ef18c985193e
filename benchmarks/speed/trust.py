"""What trust costs: merges that wait for the disk and merges that do not, by turns, and the speed of hashing.

    python -m benchmarks.speed.trust [--pairs 40] [--most 1.03] [--shape 135m|1.5b] [--work DIR]

Merges are made in one process for each method, in pairs: one of a pair waits for the disk, in the other ``fsync`` and
``fdatasync`` do nothing, and which comes first changes from pair to pair, so that a slow spell of the machine falls on
both alike. What the first ends with is on the disk; what the second leaves in memory is written later, at nobody's
time: before each merge the disk is waited for, so that neither pays for the other. The first pair is left out.

What decides is the median of the pairs' ratios, with an interval for it that assumes nothing about how times spread
(order statistics, at least 95 %). The cost is below ``--most`` when the whole interval is, above when all of it is, and
undecided in between: then give more pairs, or a quieter machine. Ends with 0, 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.provenance import origin
from benchmarks.speed.shapes import QWEN_1_5B, SMOLLM2_135M, write_family

from modicum.content import hash_file
from modicum.durable import write_atomic
from modicum.environment import environment

RESULTS = Path(__file__).parents[1] / "results" / "trust-speed.json"
SHAPES = {"135m": SMOLLM2_135M, "1.5b": QWEN_1_5B}
METHODS = {"task_arithmetic": {"scale": 0.4}, "ties": {"density": 0.2}}
MERGES = """
import json, os, shutil, sys, time
from pathlib import Path
from modicum.jobs.merge import make_plan
from modicum.recipe import parse
from modicum.weights.merge import run_plan
recipe, out, pairs = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
waits = os.fsync, os.fdatasync
def merged(wait):
    os.fsync, os.fdatasync = waits if wait else (lambda _: None,) * 2
    plan = make_plan(parse(recipe))
    plan.identity  # hashed beforehand: that is measured by itself
    os.sync()
    start = time.perf_counter()
    run_plan(plan, out, fork=True, progress=False)
    took = time.perf_counter() - start
    shutil.rmtree(out)
    return took
for pair in range(pairs + 1):
    order = (True, False) if pair % 2 else (False, True)
    found = {wait: merged(wait) for wait in order}
    if pair:
        print(json.dumps([found[True], found[False]]), flush=True)
"""


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return an interval that holds the median with at least this probability, whatever the values' distribution.

    Example:
        >>> median_interval([float(n) for n in range(1, 21)])
        (6.0, 15.0)
        >>> median_interval([1.0, 2.0, 3.0])  # too few to tell
        (-inf, inf)
    """
    n, chance, out = len(values), 0.5 ** len(values), 0
    # `out` values at each end are left out: as many as still lie on one side of the median with half of 1 - level.
    while chance <= (1 - level) / 2 and out < n:
        out += 1
        chance += math.comb(n, out) * 0.5**n
    if out == 0:
        return -math.inf, math.inf
    ordered = sorted(values)
    return ordered[out - 1], ordered[n - out]


def verdict(interval: tuple[float, float], most: float) -> str:
    """Return whether a ratio is below a limit, above it, or not known.

    Example:
        >>> [verdict(found, 1.03) for found in ((1.0, 1.02), (1.04, 1.1), (1.01, 1.06))]
        ['below', 'above', 'undecided']
    """
    return "below" if interval[1] <= most else "above" if interval[0] > most else "undecided"


def hashing(paths: list[Path], threads: int, rounds: int) -> float:
    """Return the best speed at which files in memory are hashed, in GB/s."""
    total, best = sum(path.stat().st_size for path in paths), 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda path: hash_file(path, cached=False), paths))
        best = max(best, total / 1e9 / (time.perf_counter() - start))
    return best


def main() -> int:
    """Measure, decide and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--pairs", type=int, default=40)
    arguments.add_argument("--most", type=float, default=1.03, help="the largest ratio that will do")
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    arguments.add_argument("--shape", choices=SHAPES, default="135m", help="of the models; the larger takes 12 GB")
    arguments.add_argument("--work", type=Path, help="a folder on the disk in question; the temporary one")
    arguments.add_argument("--trial", action="store_true", help="write nothing")
    chosen = arguments.parse_args()
    work = Path(tempfile.mkdtemp(prefix="trust-", dir=chosen.work))
    try:
        base, experts = write_family(work, SHAPES[chosen.shape], experts=2)
        files = [folder / "model.safetensors" for folder in (base, *experts)]
        rows = {}
        for method in chosen.methods:
            recipe = {"job": "merge", "base": str(base), "experts": [str(e) for e in experts],
                      "method": {"name": method, **METHODS[method]}}  # fmt: skip
            command = [sys.executable, "-c", MERGES, json.dumps(recipe), str(work / "out"), str(chosen.pairs)]
            done = subprocess.run(command, capture_output=True, check=True, text=True)
            pairs = [json.loads(line) for line in done.stdout.splitlines()]
            ratios = [a / b for a, b in pairs]
            interval = median_interval(ratios)
            rows[method] = {
                "seconds": {how: statistics.median(times) for how, times in zip(("with", "without"), zip(*pairs))},
                "ratio": statistics.median(ratios), "interval": interval, "verdict": verdict(interval, chosen.most),
                "pairs": [[round(a, 4), round(b, 4)] for a, b in pairs],
            }  # fmt: skip
            print(method, {key: value for key, value in rows[method].items() if key != "pairs"}, flush=True)
        result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        result.setdefault("shapes", {})[chosen.shape] = {
            "what": "merges of two experts", "most": chosen.most, "merge": rows,
            "bytes": sum(file.stat().st_size for file in files), "environment": environment(), **origin(),
        }  # fmt: skip
        if chosen.shape == "135m":
            result["hash_gb_per_s"] = {f"{n} threads": round(hashing(files, n, 7), 2) for n in (1, 2)}
            print(result["hash_gb_per_s"])
        if not chosen.trial:
            write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
        found = {row["verdict"] for row in rows.values()}
        return 1 if "above" in found else 2 if "undecided" in found else 0
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    raise SystemExit(main())
