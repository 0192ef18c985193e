"""Merges of the shape of a model of 8 billion weights on an accelerator, beside reading and writing the bytes.

    python -m benchmarks.speed.merging_accelerator [--layers 32] [--methods linear ties tsv] [--work DIR]

A base and three experts in bfloat16 of made-up numbers, end to end: reading, merging, writing, checking that all is
finite. The floor reads all inputs' bytes and writes as many as the result has, by one thread. 80 GB at full depth: let
``--work`` be in memory where it fits. Adds to ``benchmarks/results/merge-accelerator.json``.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.provenance import origin
from benchmarks.speed.merging import copy_bytes
from benchmarks.speed.shapes import LLAMA_3_8B, llama_shapes, write_config
from safetensors.torch import save_file

from modicum.environment import environment
from modicum.jobs.merge import make_plan
from modicum.recipe import parse
from modicum.record import write_atomic
from modicum.weights.merge import run_plan

RESULTS = Path(__file__).parents[1] / "results" / "merge-accelerator.json"
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"name": "task_arithmetic", "scale": 0.3},
    "ties": {"name": "ties", "density": 0.2},
    "tsv": {"name": "tsv"},
}


def write_models(work: Path, config: dict[str, object], device: str) -> list[Path]:
    """Write a base and three experts near it, whose numbers are drawn on the accelerator."""
    folders = [work / name for name in ("base", "one", "two", "three")]
    names = llama_shapes(config)
    for number, folder in enumerate(folders):
        if (folder / "config.json").exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        made: dict[str, torch.Tensor] = {}
        for i, (name, shape) in enumerate(names.items()):
            base = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(i)).mul_(0.02)
            if number:
                seed = 10_000 * number + i
                # As fine-tuning leaves them: a spectrum that falls, and noise.
                noise = torch.randn(shape, device=device, generator=torch.Generator(device).manual_seed(seed))
                base.add_(noise, alpha=0.002)
            made[name] = base.bfloat16().cpu()
        save_file(made, folder / "model.safetensors", {"format": "pt"})
        write_config(folder, config)
    return folders


def main() -> None:
    """Measure and write the results; methods measured before are kept unless they are measured again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=int(LLAMA_3_8B["num_hidden_layers"]))
    parser.add_argument("--vocabulary", type=int, default=int(LLAMA_3_8B["vocab_size"]))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "modicum-merge-accelerator")
    options = parser.parse_args()
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    config = {**LLAMA_3_8B, "num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    began = time.perf_counter()
    base, *experts = write_models(options.work / str(options.layers), config, device)
    print(f"models written in {time.perf_counter() - began:.1f} s", flush=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    gigabytes = sum((folder / "model.safetensors").stat().st_size for folder in (base, *experts)) / 1e9
    results |= {"what": __doc__, "environment": environment(), "layers": options.layers, "gigabytes read": gigabytes}
    if device != "cpu":
        results["device"] = torch.cuda.get_device_name()
    start = time.perf_counter()
    copy_bytes([folder / "model.safetensors" for folder in (base, *experts)], options.work / "copy")
    results["read and write seconds"] = floor = time.perf_counter() - start
    (options.work / "copy").unlink()
    for name in options.methods:
        document = {
            "job": "merge", "base": str(base), "experts": [str(e) for e in experts], "method": METHODS[name],
            "device": device,
        }  # fmt: skip
        out = options.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        plan = make_plan(parse(document))
        start = time.perf_counter()
        run_plan(plan, out, progress=False)
        seconds = time.perf_counter() - start
        found: dict[str, Any] = {"seconds": seconds, "over_floor": seconds / floor, "method": METHODS[name]}
        if device != "cpu":
            found["peak device GB"] = torch.cuda.max_memory_allocated() / 1e9
            torch.cuda.reset_peak_memory_stats()
        results.setdefault("methods", {})[name] = found | origin()
        write_atomic(RESULTS, json.dumps(results, indent=2) + "\n")
        print(name, json.dumps(found), flush=True)
    shutil.rmtree(options.work / "out", ignore_errors=True)


if __name__ == "__main__":
    main()
