"""What a second worker saves on cells that wait, and how long a finished grid takes when it is run again.

    python -m benchmarks.speed.grid [--cells 16] [--seconds 3] [--rounds 3] [--on ray]
    python -m benchmarks.speed.grid --again 3h-quick runs/3h-quick

Cells sleep, so that the speed-up is that of handing them out, whatever the machine computes beside. Time is that of the
whole command, and beside it that from the first cell's beginning to the last one's end. The second form runs a recipe
again in the folder where it is finished. Results are merged into ``benchmarks/results/grid-speed.json``, each case with
its code, machine and load.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "grid-speed.json"


def timed(recipe: str, folder: Path, *words: str) -> float:
    """Run a recipe by the command line; return seconds."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "modicum", "run", recipe, "--out", str(folder), "--quiet", *words]
    subprocess.run(command, check=True)
    return time.perf_counter() - begun


def waited(cells: int, seconds: float, workers: int, on: str | None) -> dict[str, Any]:
    """Run a grid of cells that wait, and once more when it is finished."""
    from waiting import lines

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage = {"name": "wait", "over": ["value"], "job": "wait", "log": str(folder / "log"), "seconds": seconds}
        grid = {"job": "grid", "axes": {"value": {"value": list(range(cells))}}, "stages": [stage]}
        (folder / "grid.yaml").write_text(json.dumps(grid))
        words = ["--workers", str(workers), *(["--on", on] if on else [])]
        whole = timed(str(folder / "grid.yaml"), folder / "run", *words)
        noted = lines(folder / "log")
        begun = [cell for what, cell, _ in noted if what == "begins"]
        if sorted(begun) != sorted(f"{value}/0" for value in range(cells)):
            raise SystemExit(f"not every cell was done once: {begun}")
        marks = [path.stat().st_mtime for path in (folder / "run").glob("stages/*/made")]
        again = timed(str(folder / "grid.yaml"), folder / "run", *words)
    return {"whole": whole, "cells": max(marks) - min(marks) + seconds, "again": again}


def speed_up(cells: int, seconds: float, rounds: int, on: str | None) -> dict[str, Any]:
    """Measure one worker and two in turns; return medians and ratios."""
    found: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(rounds):
        for workers, kept in found.items():
            kept.append(waited(cells, seconds, workers, on))
    medians = {
        key: {workers: statistics.median(one[key] for one in kept) for workers, kept in found.items()}
        for key in ("whole", "cells", "again")
    }
    return {
        "cells": cells,
        "seconds": seconds,
        "rounds": rounds,
        "seconds_by_workers": medians["whole"],
        "seconds_of_cells_by_workers": medians["cells"],
        "speed_up": medians["whole"][1] / medians["whole"][2],
        "speed_up_of_cells": medians["cells"][1] / medians["cells"][2],
        "finished_again_seconds": medians["again"][2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--on", choices=["ray", "slurm"])
    parser.add_argument("--again", nargs=2, metavar=("RECIPE", "FOLDER"))
    given = parser.parse_args()
    sys.path.append(str(ROOT / "tests"))  # the job that waits is the tests' own
    from benchmarks.provenance import origin

    from modicum.environment import environment
    from modicum.record import write_atomic
    from waiting import know_the_job

    where, load = {**origin(), "environment": environment()}, os.getloadavg()[0]
    if given.again:
        recipe, folder = given.again
        case = f"{recipe}, finished"
        result: dict[str, Any] = {"finished_again_seconds": [timed(recipe, Path(folder)) for _ in range(given.rounds)]}
    else:
        case = f"wait, {given.on or 'local'}"
        with tempfile.TemporaryDirectory() as site:
            os.environ |= know_the_job(Path(site) / "site")
            result = speed_up(given.cells, given.seconds, given.rounds, given.on)
    result = {**where, "load": [load, os.getloadavg()[0]], **result}
    old = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    write_atomic(RESULTS, json.dumps({"cases": old.get("cases", {}) | {case: result}}, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
