"""TSV-M and RESM beside the published procedure: python -m benchmarks.speed.merging_svd [--rounds 3].

Three experts of 1024 x 4096. The published code decomposes every delta fully, then both stacks of singular vectors
fully, in float32; modicum takes leading directions from Gram matrices, and in a merge works on as many matrices at once
as there are cores, each with one thread. All in turn, same cores; seconds are those of one matrix, ratios are of the
medians. Accuracy is measured against the published procedure in float64, which knows no cut-off, and against the same
with our default cut-off.

Beside it, TSV-M of three LoRA experts of rank 16 for all linear layers of a model shaped like Llama-2-7B.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from benchmarks.tables import RESULTS
from torch import Tensor

from modicum.environment import environment
from modicum.random import generator
from modicum.record import write_atomic
from modicum.weights import merge_state_dicts
from modicum.weights.adapter import LowRank
from modicum.weights.lora import merge_factors
from modicum.weights.methods.resm import resm
from modicum.weights.methods.tsv import tsv
from modicum.weights.stream import cores, run_all

DEFAULT_RTOL: float = inspect.signature(tsv).parameters["whiten_rtol"].default
UNCUT = 1e-12  # next to no cut-off, as comparable with the published procedure as a Gram matrix allows
LAYERS, WIDTH, INNER, LORA_RANK = 32, 4096, 11008, 16
MODULES = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]


def published(base: Tensor, experts: list[Tensor], *, rtol: float = 0.0) -> Tensor:
    """TSV-M as its authors' code does it; ``rtol`` adds our cut-off, of squared lengths, which theirs does not know."""
    k = min(base.shape) // len(experts)
    parts = [torch.linalg.svd(expert - base, full_matrices=False) for expert in experts]
    strengths = torch.cat([s[:k] for _, s, _ in parts])
    left = orthogonal(torch.cat([u[:, :k] for u, _, _ in parts], 1), rtol)
    right = orthogonal(torch.cat([vh[:k] for _, _, vh in parts], 0), rtol)
    return base + torch.linalg.multi_dot([*left, torch.diag(strengths), *right])


def orthogonal(stack: Tensor, rtol: float) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(stack, full_matrices=False)
    if not rtol:
        return u, vh
    kept = s.square() > rtol * s[0].square()
    return u[:, kept], vh[kept]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def adapters() -> dict[str, object]:
    """Merge the factors of every layer; all layers hold the same numbers, which no arithmetic profits from."""
    rng = generator(0, "merging-svd", "lora")
    experts = [
        [LowRank(torch.randn(LORA_RANK, n, generator=rng), torch.randn(m, LORA_RANK, generator=rng), 0.1)
         for _ in range(3)]
        for m, n in MODULES
    ]  # fmt: skip

    def one(name: str) -> int:
        merged, _, _ = merge_factors(experts[int(name) % len(MODULES)])
        return len(merged)

    ranks: list[int] = []
    names = [str(place) for place in range(LAYERS * len(MODULES))]
    wall, cpu = timed(lambda: ranks.extend(dict(run_all(one, names, workers=cores())).values()))
    return {"modules": len(ranks), "rank": max(ranks), "seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rng = generator(0, "merging-svd")
    base = 0.02 * torch.randn(options.rows, options.columns, generator=rng)
    experts = [base + 1e-3 * torch.randn(base.shape, generator=rng) for _ in range(3)]
    in_double = base.double(), [expert.double() for expert in experts]
    exact = {rtol: published(*in_double, rtol=rtol) - base for rtol in (0.0, DEFAULT_RTOL)}
    several = cores()
    name_all = [str(place) for place in range(several)]

    def engine(method: str, **knobs: float) -> Callable[[], Tensor]:
        models = [dict.fromkeys(name_all, tensor) for tensor in (base, *experts)]
        return lambda: merge_state_dicts(models[0], models[1:], method=method, **knobs)["0"]

    arms: dict[str, tuple[Callable[[], Tensor], int]] = {  # what to run, and how many matrices it merges
        "published, full SVD": (lambda: published(base, experts), 1),
        "tsv, next to no cut-off": (lambda: tsv(base, experts, whiten_rtol=UNCUT), 1),
        "tsv": (lambda: tsv(base, experts), 1),
        "resm": (lambda: resm(base, experts), 1),
        "tsv, next to no cut-off, in a merge": (engine("tsv", whiten_rtol=UNCUT), several),
        "tsv, in a merge": (engine("tsv"), several),
        "resm, in a merge": (engine("resm"), several),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(options.rounds):
        for name, (run, count) in arms.items():
            wall, cpu = timed(run)
            taken[name].append((wall / count, cpu / count))
            print(name, taken[name][-1], flush=True)
    results = {}
    for name, times in taken.items():
        wall, cpu = (statistics.median(clock) for clock in zip(*times))
        results[name] = {"seconds": round(wall, 3), "cpu_seconds": round(cpu, 3)}
        if "resm" not in name and "merge" not in name:  # resm weighs the experts, and a merge gives the same bytes
            merged = arms[name][0]() - base
            for rtol, expected in exact.items():
                key = "relative_difference_from_float64" + (f"_with_cut_off_{rtol}" if rtol else "")
                results[name][key] = float((merged - expected).norm() / expected.norm())
    floor = results["published, full SVD"]
    for found in results.values():
        found["faster"] = round(floor["seconds"] / found["seconds"], 2)
        found["faster_cpu"] = round(floor["cpu_seconds"] / found["cpu_seconds"], 2)
    document = {"what": __doc__, "shape": list(base.shape), "rounds": options.rounds, "load": os.getloadavg(),
                "environment": environment(), "results": results, "lora": adapters()}  # fmt: skip
    write_atomic(RESULTS / "merge-svd.json", json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
