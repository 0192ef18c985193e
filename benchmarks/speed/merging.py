"""Merging beside mergekit, whole processes in turn: seconds, processor seconds, and peak anonymous memory.

    python -m benchmarks.speed.merging --mergekit ENV/bin/mergekit-yaml [--rounds 3] [--methods ties] [--work DIR]
    python -m benchmarks.speed.merging --mergekit ENV/bin/mergekit-yaml --methods --shapes 1.5b 7b

Both read the same mergekit file: a base and three experts of SmolLM2-135M's shape in bfloat16, made-up numbers. Memory
is anonymous memory, polled, less that of the bare imports; pages of mapped files belong to the page cache and do not
count. Ours is that of all its processes in a run of its own: a page that several share (``Pss_Anon``) counts once.
``inside`` is our merge in a process that has imported everything, beside reading all inputs' bytes and writing as many
as the result has. ``--shapes`` shows the memory of larger models, few layers of them and all; mergekit takes the few.
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
from benchmarks.provenance import origin
from benchmarks.speed.shapes import LLAMA_2_7B, QWEN_1_5B, SMOLLM2_135M, write_family, write_repeated

from modicum.environment import environment
from modicum.record import write_atomic

RESULTS = Path(__file__).parents[1] / "results" / "merge.json"
WEIGHTED = {"weight": 0.5, "density": 0.5}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 1.0},
    "task_arithmetic": {"weight": 0.4},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_linear": WEIGHTED,
    "dare_ties": WEIGHTED,
    "della": {**WEIGHTED, "epsilon": 0.1},
    "della_linear": {**WEIGHTED, "epsilon": 0.1},
    "breadcrumbs": {**WEIGHTED, "gamma": 0.01},
    "breadcrumbs_ties": {**WEIGHTED, "gamma": 0.01},
    "model_stock": {},
    "slerp": {"t": 0.4},
    "nuslerp": {"weight": 0.5},
    "multislerp": {"weight": 0.5},
    "karcher": {},
    "sce": {"select_topk": 0.5},
    "ram": {},
}
EXPERTS = {"slerp": 1, "nuslerp": 2}  # of those that do not take three
WITHOUT_BASE = {"linear", "nuslerp", "multislerp", "karcher"}
SHAPES = {"1.5b": QWEN_1_5B, "7b": LLAMA_2_7B}
FEW_LAYERS = 4
SHAPED = ("task_arithmetic", "ties")
IMPORTS = {
    "modicum": "import modicum.cli, modicum.jobs.merge, modicum.weights.merge, yaml, pydantic, torch",
    "mergekit": "import mergekit.scripts.run_yaml, torch",
}


INSIDE = """
import json, sys, time
from pathlib import Path
from modicum.jobs.merge import make_plan
from modicum.recipe import parse, read
from modicum.weights.kernels import fused
from modicum.weights.merge import run_plan
fused.prepare(1 << 40)
plan = make_plan(parse(read(sys.argv[1])))
start = time.perf_counter()
run_plan(plan, Path(sys.argv[2]), fork=True, progress=False)
print(json.dumps(time.perf_counter() - start))
"""


def write_config(path: Path, method: str, base: Path, experts: list[Path]) -> Path:
    """Write the mergekit file of one merge."""
    models = [{"model": str(expert)} for expert in experts[: EXPERTS.get(method)]]
    document: dict[str, Any] = {"merge_method": method, "models": models}
    if method not in WITHOUT_BASE:
        document["base_model"] = str(base)
    document |= {"parameters": PARAMETERS[method], "dtype": "bfloat16"}
    path.write_text(yaml.safe_dump(document))
    return path


def inside(config: Path, out: Path, rounds: int) -> dict[str, float]:
    """Return the seconds of our merge without imports, and of reading and writing the same bytes; medians."""
    document = yaml.safe_load(config.read_text())
    folders = [model["model"] for model in document["models"]] + [document.get("base_model")]
    sources = [Path(folder) / "model.safetensors" for folder in folders if folder]
    times: dict[str, list[float]] = {"seconds": [], "read_and_write": []}
    for _ in range(rounds):
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-c", INSIDE, str(config), str(out)]
        times["seconds"].append(json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
        shutil.rmtree(out)
        start = time.perf_counter()
        copy_bytes(sources, config.with_suffix(".copy"))
        times["read_and_write"].append(time.perf_counter() - start)
        config.with_suffix(".copy").unlink()
    found = {name: statistics.median(values) for name, values in times.items()}
    return found | {"over_floor": found["seconds"] / found["read_and_write"]}


def copy_bytes(sources: list[Path], out: Path) -> None:
    """Read all files, and write the bytes of the first."""
    buffer = memoryview(bytearray(1 << 23))
    with out.open("wb", buffering=0) as written:
        for i, source in enumerate(sources):
            with source.open("rb", buffering=0) as file:
                while n := file.readinto(buffer):
                    if i == 0:
                        written.write(buffer[:n])


def measure(command: list[str], *, family: bool = False) -> dict[str, float]:
    """Run a process and return its wall and processor seconds and its peak anonymous memory in MB.

    With ``family`` the memory is that of its children too. Counting the pages they share slows them: time others.
    """
    before = os.times()
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid, family=family))
        time.sleep(0.01)
    wall = time.perf_counter() - start
    after = os.times()
    if process.returncode:
        raise RuntimeError(f"{command} failed: {process.stderr.read().decode()[-500:] if process.stderr else ''}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak / 1e6}


def anonymous(pid: int, *, family: bool) -> int:
    """Return the anonymous memory of a process, or of it and its children, in bytes."""
    children = _read(Path(f"/proc/{pid}/task/{pid}/children")).split() if family else []
    field, file = ("Pss_Anon", "smaps_rollup") if children else ("RssAnon", "status")
    lines = [line for one in (pid, *children) for line in _read(Path(f"/proc/{one}/{file}")).splitlines()]
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has just ended
        return ""


def main() -> None:
    """Measure and write the results; methods measured before are kept unless they are measured again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=list(PARAMETERS), choices=list(PARAMETERS))
    parser.add_argument("--shapes", nargs="+", default=[], choices=list(SHAPES))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "modicum-merge-benchmark")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    pythons = {"modicum": sys.executable, "mergekit": str(options.mergekit.parent / "python")}
    # The first of each reads its libraries from the disk, which the merges that follow do not.
    several = {name: [measure([python, "-c", IMPORTS[name]]) for _ in range(3)] for name, python in pythons.items()}
    bare = {name: min(runs, key=lambda run: run["seconds"]) for name, runs in several.items()}
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {
        "what": __doc__, "environment": environment(), "load": os.getloadavg(), "bare_imports": bare,
    }  # fmt: skip

    def save(kind: str, name: str, found: dict[str, Any]) -> None:
        results.setdefault(kind, {})[name] = found | origin()
        write_atomic(RESULTS, json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(found.get("ratio", found)), flush=True)

    if options.methods:
        base, experts = write_family(options.work / "135m", SMOLLM2_135M)
    for method in options.methods:
        config = write_config(options.work / f"{method}.yaml", method, base, experts)
        runs: dict[str, list[dict[str, float]]] = {"modicum": [], "mergekit": []}
        for _ in range(options.rounds):
            for name in runs:
                runs[name].append(run(name, options.mergekit, config, options.work))
        watched = run("modicum", options.mergekit, config, options.work, family=True)
        runs["modicum"] = [timed | {"peak_mb": watched["peak_mb"]} for timed in runs["modicum"]]
        found = summarize(runs, bare) | {"inside": inside(config, options.work / "out-inside", options.rounds)}
        save("methods", method, found)
    for shape in options.shapes:
        save("shapes", shape, measure_shape(shape, options.mergekit, options.work, bare))


def run(name: str, mergekit: Path, config: Path, work: Path, *, family: bool = False) -> dict[str, float]:
    """Merge with one of the two, as a user would; the result is deleted."""
    out = work / f"out-{name}"
    shutil.rmtree(out, ignore_errors=True)
    command = {
        "modicum": [sys.executable, "-m", "modicum", "run", str(config), "--quiet", "--out", str(out)],
        "mergekit": [str(mergekit), str(config), str(out), "--quiet"],
    }[name]
    try:
        return measure(command, family=family)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def measure_shape(shape: str, mergekit: Path, work: Path, bare: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return the peak memory above the imports: ours with few layers and with all, mergekit's with few."""
    found: dict[str, Any] = {}
    every = int(SHAPES[shape]["num_hidden_layers"])
    for layers in (FEW_LAYERS, every):
        root = work / f"{shape}-{layers}"
        config = {**SHAPES[shape], "num_hidden_layers": layers}
        base, experts = write_repeated(root, config)
        for method in SHAPED:
            path = write_config(root / f"{method}.yaml", method, base, experts)
            tools = ["modicum", "mergekit"] if layers == FEW_LAYERS else ["modicum"]
            for tool in tools:
                measured = run(tool, mergekit, path, work, family=True)
                above = measured["peak_mb"] - bare[tool]["peak_mb"]
                found.setdefault(method, {})[f"{tool}, {layers} layers"] = measured | {"above_imports_mb": above}
        shutil.rmtree(root)
    for runs in found.values():
        few, most, theirs = (
            runs[key]["above_imports_mb"]
            for key in (f"modicum, {FEW_LAYERS} layers", f"modicum, {every} layers", f"mergekit, {FEW_LAYERS} layers")
        )
        runs["ratio"] = {"memory": most / theirs, "all_layers_over_few": most / few}
    return found


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
        "seconds_without_imports": _without_imports(theirs, bare["mergekit"]) / _without_imports(ours, bare["modicum"]),
        "memory": ours["above_imports_mb"] / theirs["above_imports_mb"],
    }
    return found


def _without_imports(found: dict[str, Any], bare: dict[str, float]) -> float:
    return float(found["seconds"]["median"] - bare["seconds"])


if __name__ == "__main__":
    main()
