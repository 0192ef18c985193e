"""Averagers that search by a loss, beside brute force and transcriptions in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modicum.weights import average_state_dicts
from modicum.weights.average import Choice, choose
from modicum.weights.kernels import surrogate
from modicum.weights.kernels.surrogate import Surrogate
from modicum.weights.search import Landscape
from oracles import sewa as oracle

POINTS = np.array([0.0, 1.0, 2.0, 10.0])


def bowl(weights: dict[str, Tensor], target: Tensor) -> Tensor:
    return (weights["w"] - torch.as_tensor(target)).square().sum()


def run(method: str, points: np.ndarray, targets: np.ndarray, **knobs: Any) -> Choice:
    known = [{"w": torch.tensor(point)} for point in points.reshape(len(points), -1)]
    landscape = Landscape(bowl, known, list(torch.tensor(targets)))
    return choose(known, method=method, landscape=landscape, fallback=False, **knobs)


SEARCHES: dict[str, Callable[..., Any]] = {"best": oracle.best, "greedy": oracle.greedy, "window": oracle.window}


@pytest.mark.oracle("averagers", SEARCHES)
@pytest.mark.parametrize("method", SEARCHES)
@pytest.mark.parametrize("seed", range(6))
def test_a_search_by_values_is_that_of_the_oracle(method: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    points, targets = rng.normal(size=(6, 3)), 0.5 * rng.normal(size=(2, 3))
    expected = SEARCHES[method](lambda w: float(np.mean(((w @ points - targets) ** 2).sum(1))), 6)
    np.testing.assert_allclose(run(method, points, targets).coefficients, expected)


@pytest.mark.parametrize(
    ("method", "target", "expected"),
    [
        ("greedy", 1.5, [0, 0.5, 0.5, 0]),
        ("greedy", 1.0, [0, 1, 0, 0]),
        ("window", 1.5, [0, 0.5, 0.5, 0]),
        ("window", 1.0, [1 / 3, 1 / 3, 1 / 3, 0]),
        ("best", 1.4, [0, 1, 0, 0]),
        ("best", 1.5, [0, 0, 1, 0]),
    ],
)
def test_by_hand_and_ties(method: str, target: float, expected: list[float]) -> None:
    assert run(method, POINTS, np.array([[target]])).coefficients == pytest.approx(expected)


def test_bounds_and_reports_of_searches() -> None:
    greedy = run("greedy", POINTS, np.array([[1.5]]), most=1)
    assert greedy.coefficients == [0, 0, 1, 0] and [t["kept"] for t in greedy.trace["greedy"]] == [True]
    window = run("window", POINTS, np.array([[1.0]]), most=2)
    assert len(window.trace["windows"]) == 7 and window.coefficients == [0, 1, 0, 0]
    assert window.passes == {"values": 7, "gradients": 0}


@pytest.mark.oracle("averagers", "random")
def test_random_choices_are_all_alike() -> None:
    counts = np.zeros(5)
    for seed in range(400):
        chosen = choose(range(5), method="random", seed=seed, k=2).coefficients
        assert sorted(chosen) == [0, 0, 0, 0.5, 0.5]
        counts += np.array(chosen) * 2
    share = counts / 400
    assert np.abs(share - 0.4).max() < 4 * np.sqrt(0.4 * 0.6 / 400)


@pytest.mark.oracle("averagers", "simplex")
def test_simplex_takes_the_steps_of_the_oracle() -> None:
    rng = np.random.default_rng(0)
    points, targets = rng.normal(size=(5, 4)), rng.normal(size=(3, 4))
    found = run("simplex", points, targets, iters=30, lr=0.1)

    def slope(c: np.ndarray, step: int) -> np.ndarray:
        return points @ (2 * (c @ points - targets[step % 3]))

    expected = oracle.softmax_search(slope, 5, iters=30, lr=0.1)
    np.testing.assert_allclose(found.coefficients, expected, rtol=1e-6)
    assert len(found.trace["losses"]) == 30


@pytest.mark.parametrize(
    ("target", "expected"), [((0.2, 0.3), (0.5, 0.2, 0.3)), ((1, 1), (0, 0.5, 0.5)), ((-1, 0.5), (0.5, 0, 0.5))]
)
def test_weights_of_the_surrogate_by_hand(target: tuple[float, ...], expected: tuple[float, ...]) -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(oracle.simplex_minimum(points, np.array(target)), expected, atol=1e-9)
    known = [{"w": torch.tensor(p).float()} for p in points]
    batch = torch.tensor(target, dtype=torch.float32)
    found = average_state_dicts(known, method="quadratic", loss=bowl, batches=[batch])[1]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.oracle("averagers", "quadratic")
@pytest.mark.parametrize("seed", range(4))
def test_on_a_bowl_the_surrogate_is_exact(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, points, targets = 7, rng.normal(size=(7, 5)), 0.3 * rng.normal(size=(2, 5))

    def value(w: np.ndarray) -> float:
        return float(np.mean(((w @ points - targets) ** 2).sum(1)))

    nearest = oracle.simplex_minimum(points, targets.mean(0))
    found = run("quadratic", points, targets)
    assert value(np.array(found.coefficients)) == pytest.approx(value(nearest), abs=1e-7)
    for k in range(1, n):
        found = run("quadratic", points, targets, k=k)
        assert {i for i, c in enumerate(found.coefficients) if c} == set(oracle.subset(value, n, k))
    free = run("quadratic", points, targets, k="auto")
    curve = [value(oracle.mean(oracle.subset(value, n, k), n)) for k in range(1, n + 1)]
    np.testing.assert_allclose([loss for _, loss in free.trace["surrogate"]], curve, atol=1e-7)
    assert value(np.array(free.coefficients)) == pytest.approx(min(curve))
    for start, length, loss in free.trace["windows"]:
        assert loss == pytest.approx(value(oracle.mean(range(start, start + length), n)), abs=1e-7)
    assert free.passes["gradients"] == 2 * (n + 1) and len(free.trace["tried"]) == 3


def test_subsets_are_enumerated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(8, 5))
    fit = Surrogate(0.0, points @ rng.normal(size=5), 2 * points @ points.T)
    whole = [fit.subset(k) for k in range(1, 9)]
    monkeypatch.setattr(surrogate, "CHUNK", 7)
    for k, found in enumerate(whole, 1):
        again = fit.subset(k)
        assert [chosen for _, chosen in again] == [chosen for _, chosen in found]
        assert [loss for loss, _ in again] == pytest.approx([loss for loss, _ in found])
        assert found == sorted(found) and len(found) == min(3, math.comb(8, k))


def test_many_subsets_are_sought_by_exchanges() -> None:
    rng = np.random.default_rng(0)
    n, k = 30, 15  # 155 million
    points, target = rng.normal(size=(n, 40)), np.zeros(40)
    fit = Surrogate(0.0, -2 * points @ target, 2 * (points - points.mean(0)) @ (points - points.mean(0)).T)
    (loss, chosen), = fit.subset(k)  # fmt: skip
    for out in chosen:
        for into in set(range(n)) - set(chosen):
            w = oracle.mean(sorted({*chosen, into} - {out}), n)
            assert float(fit(w)) >= loss - 1e-12


def test_a_surrogate_that_is_not_convex_has_its_minimum_in_a_corner() -> None:
    A = -np.eye(4) + 0.25
    w = Surrogate(0.0, np.array([0.0, 0.0, -0.01, 0.0]), A).weights()
    np.testing.assert_allclose(w, [0, 0, 1, 0], atol=1e-9)
