"""Every rule on the snapshots of one run: tuned alike, judged alike, reported on data that no rule has seen."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from benchmarks.cells import measure_all, resumable
from torch import Tensor, nn

from modicum.registry import averager
from modicum.weights import Snapshots
from modicum.weights.average import Choice, choose, guard
from modicum.weights.averagers.support import mean_of
from modicum.weights.search import Landscape, Loss

LENGTHS = (1, 2, 3, 5, 8, 12, 20)  # windows and numbers of checkpoints
DECAYS = (0.5, 0.7, 0.8, 0.9)
K = 5  # where a number is fixed, as the publication fixes it
DRAWS = 5
HELD_OUT = "sewa, k auto, on held-out data"
SAME = "greedy, with the forwards of sewa"
BACKWARD = 3  # forwards that a gradient costs

Report = Callable[[list[float]], dict[str, float]]
State = dict[str, Tensor]


def run_study(
    what: str | None,
    name: str,
    about: Mapping[str, Any],
    regimes: Mapping[str, Sequence[Any]],
    work: Callable[..., dict[str, Any]],
    *,
    minutes: float = 7.0,
    seeds: int = 3,
) -> None:
    """Measure the cells of a study that have no result yet: the command line of the modules here.

    Args:
        what: Shown by ``--help``.
        name: Of the result file.
        about: What all cells are measured with.
        regimes: The names of the regimes, and what ``work`` gets before the seed.
        work: Measures a cell.
        minutes: No cell is begun after so many, unless told otherwise.
        seeds: How many, unless told otherwise.
    """
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--seeds", type=int, default=seeds)
    given = parser.parse_args()
    torch.set_num_threads(1)
    recall = resumable(name, minutes=given.minutes, about=about)
    cells = [(regime, seed) for seed in range(given.seeds) for regime in regimes]
    measure_all(recall, {f"{regime} | {seed}": partial(work, *regimes[regime], seed) for regime, seed in cells})


@dataclass(frozen=True)
class Trajectory:
    """How a small model is trained at a constant rate, and which of its states are kept: the last, evenly spaced."""

    steps: int
    batch: int
    keep: int
    every: int
    clip: float = math.inf

    def run(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor], Tensor],
        *,
        rows: int,
        draws: torch.Generator,
    ) -> list[State]:
        """Train on batches of row numbers, and return the states."""
        snapshots = Snapshots(model, keep=self.keep)
        for step in range(1, self.steps + 1):
            loss(torch.randint(rows, (self.batch,), generator=draws)).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            if step > self.steps - self.keep * self.every and step % self.every == 0:
                snapshots.take(step)
        return snapshots.states()


def rules(n: int) -> dict[str, list[tuple[str, dict[str, Any], int]]]:
    """Return the grid of each rule: method, knobs, and how many of the latest checkpoints it is given."""
    lengths = sorted({min(length, n) for length in LENGTHS})
    return {
        "last": [("last", {}, n)],
        "uniform": [("uniform", {}, n)],
        f"lawa {K}": [("lawa", {"last": min(K, n)}, n)],
        "lawa, tuned": [("lawa", {"last": length}, n) for length in lengths],
        "ema, tuned": [("ema", {"decay": decay}, n) for decay in DECAYS],
        "wma, tuned": [("wma", {}, length) for length in lengths],
        "wsm sqrt, tuned": [("wsm", {"decay": "sqrt"}, length) for length in lengths],
        "power_ema, tuned": [("power_ema", {"sigma_rel": s}, n) for s in (0.05, 0.1, 0.15, 0.2, 0.25)],
    }


LEARNT: dict[str, tuple[str, dict[str, Any]]] = {
    "best": ("best", {}),
    "greedy": ("greedy", {}),
    "window": ("window", {}),
    f"sewa, k {K}": ("sewa", {"k": K}),
    f"sewa, k {K}, no exchanges": ("sewa", {"k": K, "refine": False}),
    "sewa, k auto": ("sewa", {}),
    "sewa, k auto, no exchanges": ("sewa", {"refine": False}),
    "sewa bernoulli, k auto, no exchanges": ("sewa", {"estimator": "bernoulli", "refine": False}),
    f"sewa published, k {K}": ("sewa", {"k": K, "estimator": "published", "refine": False}),
    f"sewa published, k {K}, lr 0.01": ("sewa", {"k": K, "estimator": "published", "refine": False, "lr": 0.01}),
    "simplex": ("simplex", {}),
    f"quadratic, k {K}": ("quadratic", {"k": K}),
    "quadratic, k auto": ("quadratic", {"k": "auto"}),
    "quadratic": ("quadratic", {}),
}


def measure(
    states: Sequence[State],
    loss: Loss,
    report: Report,
    *,
    batches: Sequence[Any],
    held_out: Sequence[Any],
    seed: int,
    leave_out: Sequence[str] = (),
    iters: int | None = None,
    device: str = "cpu",
) -> dict[str, dict[str, Any]]:
    """Return what each rule chose, and what came of it on the reporting data.

    Args:
        states: The snapshots, oldest first.
        loss: What the searches see.
        report: From coefficients to figures on data that nothing else looks at.
        batches: Selection.
        held_out: The guard's; rules with a grid are tuned on it.
        seed: Of the draws.
        leave_out: Learnt rules that would take too long.
        iters: Of searches that go by the gradient; their own number when not given.
        device: Where means are made.
    """
    n, along = len(states), partial(Landscape, device=device)
    judge, found = along(loss, states, held_out), dict[str, dict[str, Any]]()
    for name, grid in rules(n).items():
        began, tries = time.perf_counter(), []
        for method, knobs, given in grid:
            entry = averager[method]
            coefficients = [0.0] * (n - given) + list(entry.function(states[n - given :], **entry.knobs(knobs)))
            tries.append((judge.value(coefficients) if len(grid) > 1 else 0.0, coefficients, knobs | {"of": given}))
        _, coefficients, knobs = min(tries, key=lambda item: item[0])
        found[name] = _cell(coefficients, report, began, knobs=knobs)
    began = time.perf_counter()
    draws = [choose(states, method="random", k=min(K, n), seed=100 * seed + i).coefficients for i in range(DRAWS)]
    figures = [report(coefficients) for coefficients in draws]
    means = {key: round(sum(f[key] for f in figures) / DRAWS, 6) for key in figures[0]}
    found[f"random {K}, mean of {DRAWS}"] = means | {"seconds": round(time.perf_counter() - began, 2)}
    for name, (method, knobs) in LEARNT.items():
        if name in leave_out:
            continue
        began = time.perf_counter()
        landscape = along(loss, states, batches, held_out)
        if iters is not None and method in ("sewa", "simplex"):
            knobs = knobs | {"iters": iters}
        free = choose(states, method=method, landscape=landscape, fallback=False, seed=seed, **knobs)
        found[name] = _cell(free.coefficients, report, began, choice=free)
        if name in ("sewa, k auto", "greedy", "quadratic"):
            for tuned in (False, True):
                kept = guard(method, free.coefficients, landscape, tuned=tuned)
                cell = _cell(kept.coefficients, report, began, choice=free, fell_back=bool(kept.note))
                found[f"{name}, tuned guard" if tuned else f"{name}, guard"] = cell
        if name == "sewa, k auto" and SAME not in leave_out:
            began, budget = time.perf_counter(), free.passes["values"] + BACKWARD * free.passes["gradients"]
            again = along(loss, states, batches, held_out)
            found[SAME] = _cell(greedy_within(again, budget, seed), report, began) | {"passes": dict(again.counts)}
    if HELD_OUT not in leave_out:  # the same search on the guard's data: what choosing on training data costs
        began = time.perf_counter()
        free = choose(states, method="sewa", landscape=along(loss, states, held_out), fallback=False, seed=seed)
        found[HELD_OUT] = _cell(free.coefficients, report, began, choice=free)
    return found


def greedy_within(landscape: Landscape, budget: int, seed: int) -> list[float]:
    """Return the best of greedy searches in one order after another, the losses alone first, within so many forwards.

    Args:
        landscape: The loss along the checkpoints.
        budget: Passes over a batch; a search that has begun is finished.
        seed: Of the orders after the first.
    """
    n, rng = len(landscape.checkpoints), torch.Generator().manual_seed(seed)
    spent = n * len(landscape.batches)
    alone = [landscape.value(mean_of([i], n)) for i in range(n)]
    order, found = sorted(range(n), key=lambda i: (alone[i], -i)), list[tuple[float, list[float]]]()
    while not found or (n > 1 and spent < budget):
        chosen, loss = [order[0]], alone[order[0]]
        for i in order[1:]:
            spent += len(landscape.batches)  # an answer that is known already is paid for too
            tried = landscape.value(mean_of([*chosen, i], n))
            if tried <= loss:
                chosen, loss = [*chosen, i], tried
        found.append((loss, mean_of(chosen, n)))
        order = torch.randperm(n, generator=rng).tolist()
    return min(found)[1]


def _cell(
    coefficients: list[float], report: Report, began: float, *, choice: Choice | None = None, **more: Any
) -> dict[str, Any]:
    seconds = round(time.perf_counter() - began, 2)
    cell: dict[str, Any] = {key: round(value, 6) for key, value in report(coefficients).items()}
    cell |= {"coefficients": [round(c, 4) for c in coefficients], "seconds": seconds} | more
    if choice is not None:
        cell["passes"] = choice.passes
    return cell
