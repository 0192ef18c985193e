"""What trust costs: a merge with and without waiting for the disk in turn, and the speed of hashing.

    python -m benchmarks.speed.trust [--rounds 7] [--work DIR]

Each merge is a process of its own that times the merge alone. ``without`` makes ``fsync`` and ``fdatasync`` do nothing
there; the rest of the program is the same. What the first ends with is on the disk; what the second leaves in memory is
written later, at nobody's time: before each merge the disk is waited for, so that neither pays for the other.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.provenance import origin
from benchmarks.speed.shapes import SMOLLM2_135M, write_family

from modicum.content import hash_file
from modicum.durable import write_atomic
from modicum.environment import environment

RESULTS = Path(__file__).parents[1] / "results" / "trust-speed.json"
METHODS = {"task_arithmetic": {"scale": 0.4}, "ties": {"density": 0.2}}
MERGE = """
import json, os, sys, time
from pathlib import Path
from modicum.jobs.merge import make_plan
from modicum.recipe import parse
from modicum.weights.merge import run_plan
recipe, out, how = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
if how == "without":
    os.fsync = os.fdatasync = lambda _: None
plan = make_plan(parse(recipe))
plan.identity  # hashed beforehand: that is measured by itself
start = time.perf_counter()
run_plan(plan, out, fork=True, progress=False)
print(json.dumps(time.perf_counter() - start))
"""


def merged(recipe: dict[str, Any], out: Path, how: str) -> float:
    """Return the seconds of one merge."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    command = [sys.executable, "-c", MERGE, json.dumps(recipe), str(out), how]
    return float(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))


def hashing(paths: list[Path], threads: int, rounds: int) -> float:
    """Return the best speed at which files in memory are hashed, in GB/s."""
    total, best = sum(path.stat().st_size for path in paths), 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda path: hash_file(path, cached=False), paths))
        best = max(best, total / 1e9 / (time.perf_counter() - start))
    return best


def main() -> None:
    """Measure and write the results."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--work", type=Path)
    chosen = arguments.parse_args()
    work = Path(tempfile.mkdtemp(prefix="trust-", dir=chosen.work))
    try:
        base, experts = write_family(work, SMOLLM2_135M, experts=2)
        files = [folder / "model.safetensors" for folder in (base, *experts)]
        rows = {}
        for method, knobs in METHODS.items():
            recipe = {"job": "merge", "base": str(base), "experts": [str(e) for e in experts],
                      "method": {"name": method, **knobs}}  # fmt: skip
            times: dict[str, list[float]] = {"with": [], "without": []}
            for _ in range(chosen.rounds):
                for how, found in times.items():
                    found.append(merged(recipe, work / "out", how))
            median = {how: statistics.median(found) for how, found in times.items()}
            ratios = [a / b for a, b in zip(times["with"], times["without"])]
            rows[method] = {"seconds": median, "ratio": median["with"] / median["without"],
                            "pairs": [round(ratio, 3) for ratio in sorted(ratios)]}  # fmt: skip
            print(method, rows[method], flush=True)
        speed = {f"{n} threads": round(hashing(files, n, chosen.rounds), 2) for n in (1, 2)}
        print(speed)
        result = {"what": "a merge of two experts of SmolLM2-135M's shape, and hashing of the three files",
                  "bytes": sum(file.stat().st_size for file in files), "merge": rows, "hash_gb_per_s": speed,
                  "rounds": chosen.rounds, "environment": environment(), **origin()}  # fmt: skip
        write_atomic(RESULTS, json.dumps(result, indent=1) + "\n")
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
