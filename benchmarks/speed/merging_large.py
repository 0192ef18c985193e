"""Merges of the shape of a model of 1.5 billion weights in bfloat16, beside reading and writing the bytes.

    python -m benchmarks.speed.merging_large [--layers 28] [--mergekit ENV/bin/mergekit-yaml] [--work DIR]

A base and three experts of made-up numbers, as mergekit files, on two processes. ``inside`` is our merge in a process
that has imported everything; the floor reads all inputs' bytes and writes as many as the result has, and does not wait
for the disk, as the merge does. With ``--layers`` fewer layers are merged, so that the files stay in memory. The goals
are ratios to the floor; what misses them stays. mergekit, a whole process, is given for some methods.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.provenance import origin
from benchmarks.speed.merging import PARAMETERS, inside, run, write_config
from benchmarks.speed.shapes import QWEN_1_5B, write_family

from modicum.environment import environment
from modicum.record import write_atomic
from modicum.weights.kernels import fused
from modicum.weights.stream import cores

RESULTS = Path(__file__).parents[1] / "results" / "merge-large.json"
GOALS = {
    "linear": 1.5, "dare_linear": 2.5, "ties": 4.0, "breadcrumbs": 4.0, "della": 4.0, "della_linear": 4.0, "sce": 4.0,
}  # fmt: skip
BESIDE = ("linear", "ties")  # with mergekit


def main() -> None:
    """Measure and write the results; methods measured before are kept unless they are measured again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=int(QWEN_1_5B["num_hidden_layers"]))
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--methods", nargs="*", default=list(GOALS), choices=list(PARAMETERS))
    parser.add_argument("--prepare", action="store_true", help="write the models only")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "modicum-merge-large")
    options = parser.parse_args()
    base, experts = write_family(options.work / str(options.layers), {**QWEN_1_5B, "num_hidden_layers": options.layers})
    if options.prepare:
        return
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results |= {"what": __doc__, "environment": environment(), "cores": cores(), "compiled": fused.installed()}
    shape = results.setdefault("layers", {}).setdefault(str(options.layers), {"methods": {}})
    shape["load"] = os.getloadavg()
    for method in options.methods:
        config = write_config(options.work / f"{method}.yaml", method, base, experts)
        found: dict[str, Any] = {"inside": inside(config, options.work / "out", options.rounds)}
        shutil.rmtree(options.work / "out", ignore_errors=True)
        if goal := GOALS.get(method):
            found |= {"goal": goal, "reached": found["inside"]["over_floor"] <= goal}
        if options.mergekit and method in BESIDE:
            theirs = run("mergekit", options.mergekit, config, options.work)
            ours = run("modicum", options.mergekit, config, options.work)
            found |= {"mergekit": theirs, "modicum": ours, "ratio": theirs["seconds"] / ours["seconds"]}
        shape["methods"][method] = found | origin()
        write_atomic(RESULTS, json.dumps(results, indent=2) + "\n")
        print(method, json.dumps(found["inside"]), found.get("ratio", ""), flush=True)


if __name__ == "__main__":
    main()
