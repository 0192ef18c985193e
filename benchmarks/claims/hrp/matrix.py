"""HRP on the matrix model, where the theory is exact: learn M (256 x 256) by a product of rank 8.

    python -m benchmarks.claims.hrp.matrix

``optimal``  residual energy after the best main stage with one factor frozen, by preheating rank and by the factor that
             receives the vectors; only B is preheated, to convergence.
``trained``  the classic main stage: both factors, AdamW, noisy gradients; every method gets 130 steps in all.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from benchmarks.cells import resumable
from benchmarks.claims.hrp.result import run_cells
from torch import Tensor

from modicum.adapters.angles import captured
from modicum.adapters.drawn import default
from modicum.adapters.hrp import factor_svd, hrp_factors
from modicum.random import generator

N, RANK, PREHEAT, MAIN, SEEDS = 256, 8, 30, 100, 10
NOISE = 0.01
METHODS = ("random", "hrp-A", "hrp-B", "balanced", "exact")


def target(power: float, seed: int) -> Tensor:
    rng = generator(seed, "matrix", N)
    U, V = (torch.linalg.qr(torch.randn(N, N, generator=rng, dtype=torch.float64)).Q for _ in range(2))
    M = (U * torch.arange(1, N + 1, dtype=torch.float64) ** -power) @ V.T
    return (M / M.norm()).float()


def optimal(cell: dict[str, Any]) -> dict[str, Any]:
    M = target(1.0, cell["seed"]).double()
    A = torch.randn(cell["R"], N, generator=generator(cell["seed"], "A", cell["R"]), dtype=torch.float64)
    U, _, V = factor_svd(A, M @ torch.linalg.pinv(A))
    return {
        "right_to_A": 1 - float(captured(M, V[:, :RANK].T)),
        "left_to_B": 1 - float(captured(M.T, U[:, :RANK].T)),
        "random": 1 - float(captured(M, A[:RANK])),
        "best": 1 - float((torch.linalg.svdvals(M)[:RANK] ** 2).sum()),
    }


def train(M: Tensor, A: Tensor, B: Tensor, *, lr: float, steps: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Descend on half the squared distance, with noise of the size of a minibatch's."""
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    optimizer = torch.optim.AdamW([A, B], lr=lr, weight_decay=0.0)
    scale = NOISE * float(M.norm()) / N
    for _ in range(steps):
        error = (B @ A - M).detach() + scale * torch.randn(N, N, generator=rng)
        optimizer.zero_grad()
        (error * (B @ A)).sum().backward()
        optimizer.step()
    return A.detach(), B.detach()


def trained(cell: dict[str, Any]) -> dict[str, Any]:
    M, seed, lr = target(1.5, cell["seed"]), cell["seed"], cell["lr"]
    rng = generator(seed, "noise", cell["method"], cell["R"])
    first, factor = cell["method"].partition("-")[::2]
    steps = MAIN
    if first == "random":
        A, B = default(M, rank=RANK, rng=generator(seed, "start"))
        steps += PREHEAT  # the preheating steps are charged to everybody
    elif first == "exact":
        A, B = hrp_factors(M, torch.eye(N), rank=RANK)
        steps += PREHEAT
    else:
        start = default(M, rank=cell["R"], rng=generator(seed, "start"))
        warm = train(M, *start, lr=lr, steps=PREHEAT, rng=rng)
        A, B = hrp_factors(*warm, rank=RANK, init_factor=factor or "balanced")
    A, B = train(M, A, B, lr=lr, steps=steps, rng=rng)
    return {"residual": float((M - B @ A).square().sum() / M.square().sum())}


def cells() -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = [
        {"study": "optimal", "R": R, "seed": seed} for R in (8, 16, 32, 64, 128, 256) for seed in range(SEEDS)
    ]
    for method in METHODS:
        ranks = (8, 32, 128) if method not in ("random", "exact") else (8,)
        made += [
            {"study": "trained", "method": method, "R": R, "lr": lr, "seed": seed}
            for R in ranks for lr in (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1) for seed in range(3)
        ]  # fmt: skip
    return made


def run(cell: dict[str, Any]) -> dict[str, Any]:
    return optimal(cell) if cell["study"] == "optimal" else trained(cell)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=7.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    run_cells(resumable("hrp-matrix", minutes=options.minutes), cells(), run)


if __name__ == "__main__":
    main()
