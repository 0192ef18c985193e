"""Laws of averagers, over numbers of checkpoints and knobs; those that learn are given a bowl along toy checkpoints."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from laws import Draw, knobs, law
from torch import Tensor

from modicum.random import generator
from modicum.registry import Entry, averager
from modicum.weights.search import Landscape


def toys(n: int, seed: int) -> list[dict[str, Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    return [{"w": torch.randn(3, generator=rng)} for _ in range(n)]


def coefficients(entry: Entry[Any], given: dict[str, Any], known: Sequence[dict[str, Tensor]]) -> list[float]:
    told: list[Any] = []
    if entry.facts.learns:
        targets = [torch.zeros(3), torch.ones(3)]
        told = [Landscape(lambda weights, target: (weights["w"] - target).square().sum(), known, targets)]
    if "rng" in inspect.signature(entry.function).parameters:
        given = given | {"rng": generator(0, entry.name)}
    return list(entry.function(*told, known, **given))


def sums_to_n(checkpoints: Sequence[object]) -> list[float]:
    return [1.0] * len(checkpoints)


@law(averager, "there is a number for each checkpoint, none is negative, and they sum to 1", broken=sums_to_n)
def sums_to_one(entry: Entry[Any], draw: Draw) -> None:
    n = draw(st.integers(1, 9))
    found = coefficients(entry, knobs(entry, draw), toys(n, draw(st.integers(0, 99))))
    assert len(found) == n and all(map(math.isfinite, found)) and min(found) >= 0
    assert math.isclose(sum(found), 1, rel_tol=1e-9)


calls = iter(range(1 << 30))


def changes_its_mind(checkpoints: Sequence[object]) -> list[float]:
    chosen = next(calls) % len(checkpoints)
    return [float(i == chosen) for i in range(len(checkpoints))]


@law(averager, "asked again it answers the same, and leaves the checkpoints as they were", broken=changes_its_mind)
def repeats(entry: Entry[Any], draw: Draw) -> None:
    n, seed = draw(st.integers(2, 6)), draw(st.integers(0, 99))
    given, known = knobs(entry, draw), toys(n, seed)
    assert coefficients(entry, given, known) == coefficients(entry, given, known)
    assert all(torch.equal(a["w"], b["w"]) for a, b in zip(known, toys(n, seed)))


def worst(landscape: Landscape, checkpoints: Sequence[object]) -> list[float]:
    n = len(checkpoints)
    units = [[float(i == j) for j in range(n)] for i in range(n)]
    return max(units, key=landscape.value)


@law(averager, "one that learns is no worse than the worst checkpoint", broken=worst, learns="value")
def learns(entry: Entry[Any], draw: Draw) -> None:
    if not entry.facts.learns:
        return
    # One outlier far from all others, which are near what is sought.
    n, place = draw(st.integers(3, 6)), draw(st.integers(0, 2))
    known = [{"w": 0.1 * toy["w"] + (20.0 if i == place else 0.0)} for i, toy in enumerate(toys(n, 1))]
    given = knobs(entry, draw, k=1) if "k" in entry.schema.model_fields else knobs(entry, draw)
    if given.get("estimator") == "published" or given.get("iters", 150) < 100 or given.get("lr", 0.05) != 0.05:
        return  # a negative control, or too few or too large steps to find anything
    found = coefficients(entry, given, known)
    assert found[place] < 0.5
