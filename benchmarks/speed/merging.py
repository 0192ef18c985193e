"""Merging beside mergekit, whole processes in turn: seconds, processor seconds, and peak anonymous memory.

    python -m benchmarks.speed.merging --mergekit ENV/bin/mergekit-yaml [--rounds 3] [--methods ties] [--work DIR]

Both read the same mergekit file: a base and three experts of SmolLM2-135M's shape in bfloat16, made-up numbers. Memory
is ``RssAnon``, polled, less that of the bare imports; pages of mapped files belong to the page cache and do not count.
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
from pathlib import Path
from typing import Any

import yaml
from benchmarks.speed.shapes import SMOLLM2_135M, write_family

from modicum.record import environment, write_atomic

RESULTS = Path(__file__).parents[1] / "results" / "merge.json"
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5, "epsilon": 0.1},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.01},
    "model_stock": {},
}
IMPORTS = {
    "modicum": "import modicum.cli, modicum.jobs.merge, modicum.weights.merge, yaml, pydantic, torch",
    "mergekit": "import mergekit.scripts.run_yaml, torch",
}


def write_config(path: Path, method: str, base: Path, experts: list[Path]) -> Path:
    """Write the mergekit file of one merge."""
    document: dict[str, Any] = {"merge_method": method, "models": [{"model": str(expert)} for expert in experts]}
    if method != "linear":
        document["base_model"] = str(base)
    document |= {"parameters": PARAMETERS[method], "dtype": "bfloat16"}
    path.write_text(yaml.safe_dump(document))
    return path


def measure(command: list[str]) -> dict[str, float]:
    """Run a process and return its wall and processor seconds and its peak anonymous memory in MB."""
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.01)
    wall = time.perf_counter() - start
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{command} failed: {process.stderr.read().decode()[-500:] if process.stderr else ''}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak / 1e6}


def anonymous(pid: int) -> int:
    """Return the anonymous memory of a process in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def main() -> None:
    """Measure and write the results; methods measured before are kept unless they are measured again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(PARAMETERS), choices=list(PARAMETERS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "modicum-merge-benchmark")
    options = parser.parse_args()
    base, experts = write_family(options.work / "135m", SMOLLM2_135M)
    pythons = {"modicum": sys.executable, "mergekit": str(options.mergekit.parent / "python")}
    bare = {name: measure([python, "-c", IMPORTS[name]]) for name, python in pythons.items()}
    previous = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results = dict(previous.get("methods", {}))
    for method in options.methods:
        config = write_config(options.work / f"{method}.yaml", method, base, experts)
        outs = {name: options.work / f"out-{name}" for name in pythons}
        commands = {
            "modicum": [sys.executable, "-m", "modicum", "run", str(config), "--quiet", "--out", str(outs["modicum"])],
            "mergekit": [str(options.mergekit), str(config), str(outs["mergekit"]), "--quiet"],
        }
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
        for _ in range(options.rounds):
            for name, command in commands.items():
                shutil.rmtree(outs[name], ignore_errors=True)
                runs[name].append(measure(command))
        results[method] = summarize(runs, bare)
        print(method, json.dumps(results[method]["ratio"]), flush=True)
        write_atomic(
            RESULTS,
            json.dumps(
                {"what": __doc__, "environment": environment(), "commit": commit(), "load": os.getloadavg(),
                 "bare_imports": bare, "methods": results},
                indent=2,
            ) + "\n",
        )  # fmt: skip


def summarize(runs: dict[str, list[dict[str, float]]], bare: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return medians and spreads of both, and mergekit's over ours."""
    found: dict[str, Any] = {}
    for name, several in runs.items():
        found[name] = {
            key: {"median": statistics.median(run[key] for run in several), "all": [run[key] for run in several]}
            for key in several[0]
        }
        found[name]["above_imports_mb"] = found[name]["peak_mb"]["median"] - bare[name]["peak_mb"]
    ours, theirs = found["modicum"], found["mergekit"]
    found["ratio"] = {
        "seconds": theirs["seconds"]["median"] / ours["seconds"]["median"],
        "cpu_seconds": theirs["cpu_seconds"]["median"] / ours["cpu_seconds"]["median"],
        "memory": ours["above_imports_mb"] / theirs["above_imports_mb"],
    }
    return found


def commit() -> str:
    """Return the commit that was measured."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True).stdout.strip()


if __name__ == "__main__":
    main()
