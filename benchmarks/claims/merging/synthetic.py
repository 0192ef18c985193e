"""Two defects of merging shown on made-up matrices: python -m benchmarks.claims.merging.synthetic.

``parallel``: TSV-M of experts that are nearly the same. Where stacked directions are almost dependent, whitening
without a cut-off puts arbitrary directions in at full strength. Error is relative to the best low-rank form of the mean
delta.

``cast``: what is left of a delta after the merged weight was rounded to bfloat16.
"""

from __future__ import annotations

import json
import warnings

import torch
from benchmarks.tables import RESULTS
from torch import Tensor

from modicum.environment import environment
from modicum.linalg import truncated_svd
from modicum.random import generator
from modicum.record import write_atomic
from modicum.weights.methods.tsv import tsv

SEEDS = range(5)
SHAPES = ((24, 36), (128, 192))
NOISE = (0.0, 1e-6, 1e-3, 1e-2, 1e-1, 3e-1, 1.0)
CUTOFFS = (0.0, 1e-4, 1e-3, 1e-2, 5e-2)
SIZES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


def low_rank(delta: Tensor, k: int) -> Tensor:
    U, S, V = truncated_svd(delta, k)
    return (U * S) @ V.T


def parallel(shape: tuple[int, int], noise: float, rtol: float, seed: int) -> dict[str, float]:
    """Merge a delta with a copy of itself that has noise on it, and with one that has nothing to do with it."""
    rng = generator(seed, "parallel", *shape)
    first, other, far = torch.randn(3, *shape, generator=rng, dtype=torch.float64)
    near = first + noise * other
    k = min(shape) // 2
    base = torch.zeros_like(first)
    wanted = low_rank((first + near) / 2, k)
    merged = tsv(base, [first, near], whiten_rtol=rtol)
    apart = tsv(base, [first, far], whiten_rtol=rtol) - tsv(base, [first, far], whiten_rtol=0.0)
    norm = tsv(base, [first, far], whiten_rtol=0.0).norm()
    return {"error": float((merged - wanted).norm() / wanted.norm()), "changes_unrelated": float(apart.norm() / norm)}


def cast(size: float, seed: int) -> dict[str, float]:
    """Add a delta of relative ``size`` to weights and round them to bfloat16."""
    rng = generator(seed, "cast")
    base = (0.02 * torch.randn(1 << 20, generator=rng)).bfloat16().float()
    delta = 0.02 * size * torch.randn(1 << 20, generator=rng)
    kept = (base + delta).bfloat16().float() - base
    return {
        "share_of_entries_changed": float((kept != 0).float().mean()),
        "relative_error_of_delta": float((kept - delta).norm() / delta.norm()),
        "cosine": float(torch.nn.functional.cosine_similarity(kept, delta, dim=0)),
    }


def main() -> None:
    warnings.simplefilter("ignore")  # a small cut-off warns; that it fails is what this study shows
    cells = [
        {"study": "parallel", "shape": shape, "noise": noise, "rtol": rtol, "seed": seed}
        | parallel(shape, noise, rtol, seed)
        for shape in SHAPES
        for noise in NOISE
        for rtol in CUTOFFS
        for seed in SEEDS
    ]
    cells += [{"study": "cast", "size": size, "seed": seed} | cast(size, seed) for size in SIZES for seed in SEEDS]
    found = {"about": __doc__, "environment": environment(), "cells": cells}
    write_atomic(RESULTS / "merging-synthetic.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
