"""SeWA beside its transcription in NumPy, on checkpoints of one number whose best subsets are known by brute force."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modicum.errors import CheckpointError, ModicumError, RecipeError, UnsupportedError
from modicum.random import generator
from modicum.weights import average_state_dicts
from modicum.weights.average import choose
from modicum.weights.averagers.sewa import reinforce_slope
from modicum.weights.kernels.masks import (
    exact_mask,
    gumbel,
    independent_mask,
    log_order_slope,
    logistic,
    mean_slope,
    project_capped,
)
from modicum.weights.search import Landscape
from oracles import sewa as oracle

POINTS = (0.0, 1.0, 2.0, 10.0)
TASKS = [(1.0, 3, {0, 1, 2}), (1.5, 2, {1, 2}), (1.0, 2, {0, 2})]  # target, k, the best subset
FREE = {"refine": False, "fallback": False}


def toys(points: Sequence[float] = POINTS) -> list[dict[str, Tensor]]:
    return [{"w": torch.tensor([x])} for x in points]


def bowl(weights: dict[str, Tensor], target: float) -> Tensor:
    return (weights["w"] - target).square().sum()


def search(target: float, points: Sequence[float] = POINTS, **knobs: Any) -> list[float]:
    given: dict[str, Any] = {"method": "sewa", "loss": bowl, "batches": [target]} | knobs
    return average_state_dicts(toys(points), **given)[1]


def chosen(coefficients: Sequence[float]) -> set[int]:
    found = {i for i, c in enumerate(coefficients) if c}
    assert all(c in (0, 1 / len(found)) for c in coefficients)
    return found


@pytest.mark.parametrize(("target", "k", "best"), TASKS)
@pytest.mark.parametrize("estimator", ["exact_k", "bernoulli", "soft", "reinforce"])
def test_with_exchanges_every_seed_finds_the_best_subset(target: float, k: int, best: set[int], estimator: str) -> None:
    assert set(oracle.subset(lambda w: (w @ np.array(POINTS) - target) ** 2, 4, k)) == best
    for seed in range(10 if estimator == "exact_k" else 3):
        assert chosen(search(target, k=k, seed=seed, estimator=estimator, iters=20)) == best


def test_without_exchanges_exact_masks_find_it_too() -> None:
    seeds = range(8)
    assert all(chosen(search(1.0, k=3, seed=seed, **FREE)) == {0, 1, 2} for seed in range(4))
    assert sum(chosen(search(1.5, k=2, seed=seed, **FREE)) == {1, 2} for seed in seeds) >= 7
    assert not any(3 in chosen(search(1.0, k=2, seed=seed, **FREE)) for seed in range(3))


def test_independent_masks_never_take_the_outlier_and_the_published_form_does() -> None:
    assert not any(3 in chosen(search(1.0, k=3, seed=s, estimator="bernoulli", **FREE)) for s in range(5))
    published = [search(1.0, k=3, seed=s, estimator="published", lr=0.01, **FREE) for s in range(6)]
    assert any(3 in chosen(c) for c in published)
    assert not any(chosen(search(1.5, k=2, seed=s, estimator="published", **FREE)) == {1, 2} for s in range(2))


@pytest.mark.oracle("averagers", "sewa")
@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("k", [1, 2])
def test_logits_are_those_of_the_oracle(n: int, k: int) -> None:
    rng = np.random.default_rng(n)
    points, targets = rng.normal(size=(n, 4)), rng.normal(size=(3, 4))
    known = [{"w": torch.tensor(p)} for p in points]
    landscape = Landscape(bowl, known, list(torch.tensor(targets)))  # type: ignore[arg-type]
    settings = {"k": k, "iters": 40, "lr": 0.1, "tau": 0.7, "refine": False}
    found = choose(known, method="sewa", landscape=landscape, seed=5, fallback=False, **settings)
    draws = generator(5, "sewa")
    noises = [gumbel(n, draws).numpy() for _ in range(40)]

    def slope(w: Any, step: int) -> Any:
        return points @ (2 * (w @ points - targets[step % 3]))

    expected = oracle.search(slope, noises, k, lr=0.1, tau=0.7)
    np.testing.assert_allclose(found.trace["logits"], expected, rtol=1e-6, atol=1e-9)
    assert {i for i, c in enumerate(found.coefficients) if c} == set(np.argsort(-expected)[:k].tolist())


def test_the_exact_mask_by_hand() -> None:
    noise = torch.tensor([2.0, 0.5, 1.0, -1.0], dtype=torch.float64)
    mask = exact_mask(torch.zeros(4, dtype=torch.float64), noise, k=2)
    hard, soft, threshold = oracle.exact_k(np.zeros(4), noise.numpy(), 2, 1.0)
    assert threshold == 0.75
    assert mask.hard.tolist() == hard.tolist() == [1, 0, 1, 0]
    np.testing.assert_allclose(mask.soft, [0.7772998612, 0.4378234991, 0.5621765009, 0.1480471980], atol=1e-10)
    np.testing.assert_allclose(mask.soft, soft)
    np.testing.assert_allclose(mask.slope, [0.1731047870, 0.2461340827, 0.2461340827, 0.1261292252], atol=1e-10)
    slope = mean_slope(mask.hard, torch.tensor([3.0, 1.0, -2.0, 0.0], dtype=torch.float64))
    assert slope.tolist() == [1.25, 0.25, -1.25, -0.25]
    expected = [0.2163809837, 0.0615335207, -0.3076676034, -0.0315323063]
    np.testing.assert_allclose(slope * mask.slope, expected, atol=1e-10)


def test_the_independent_mask_by_hand() -> None:
    logits, uniform = torch.tensor([-1.0, 0.0, 1.0]).double(), torch.tensor([0.5, 0.8, 0.1]).double()
    mask = independent_mask(logits, torch.logit(uniform))
    hard, soft = oracle.bernoulli(logits.numpy(), uniform.numpy(), 1.0)
    assert mask.hard.tolist() == hard.tolist() == [0, 1, 0]
    np.testing.assert_allclose(mask.soft, [0.2689414214, 0.8, 0.2319693167], atol=1e-10)
    np.testing.assert_allclose(mask.soft, soft)


def test_one_gumbel_variable_chooses_more_often_than_the_difference_of_two() -> None:
    rng, n = torch.Generator().manual_seed(0), 40_000
    for logit, right, single in ((-1.0, 0.2689, 0.3078), (0.0, 0.5, 0.6321), (1.0, 0.7311, 0.9340)):
        logits = torch.full((n,), logit, dtype=torch.float64)
        for noise, chance in ((logistic(n, rng), right), (gumbel(n, rng), single)):
            share = float(independent_mask(logits, noise).hard.mean())
            assert abs(share - chance) < 4 * (chance * (1 - chance) / n) ** 0.5 + 1e-4


@given(st.integers(0, 1000), st.integers(2, 6))
@settings(max_examples=20, deadline=None)
def test_the_slope_in_a_mask_is_that_of_autograd_through_the_stack(seed: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    stack, target = torch.randn(n, 7, generator=rng).double(), torch.randn(7, generator=rng).double()
    h = (torch.rand(n, generator=rng) < 0.5).double()
    h[0] = 1
    leaf = h.clone().requires_grad_()
    (leaf @ stack / leaf.sum() - target).pow(4).sum().backward()
    known = [{"w": row} for row in stack]
    landscape = Landscape(lambda weights, t: (weights["w"] - t).pow(4).sum(), known, [target])
    slope = mean_slope(h, landscape.gradient((h / h.sum()).tolist())[1])
    torch.testing.assert_close(slope, leaf.grad, rtol=1e-10, atol=1e-12)
    assert abs(float((h * slope).sum())) < 1e-10 * max(1, float(slope.abs().max()))


def test_equal_checkpoints_have_no_slope_and_come_out_bit_for_bit() -> None:
    known = [{"w": torch.full((3,), 0.1)} for _ in range(4)]
    seen: list[float] = []
    landscape = Landscape(bowl, known, [2.0])
    found = choose(known, method="sewa", landscape=landscape, k=2, seed=0)
    assert max(map(abs, found.trace["logits"])) == 0
    made, _ = average_state_dicts(known, method="sewa", k=2, loss=bowl, batches=[2.0])
    assert torch.equal(made["w"], known[0]["w"]) and not seen


@pytest.mark.parametrize(
    ("s", "k", "expected"),
    [
        ((1.5, 0.9, 0.4, -0.2), 2, (1, 0.75, 0.25, 0)),
        ((5, 5, 5, 5), 2, (0.5, 0.5, 0.5, 0.5)),
        ((3, 2, -1), 1, (1, 0, 0)),
        ((0.2, 0.3, 0.1, 0), 2, (0.2, 0.3, 0.1, 0)),
    ],
)
def test_projection_by_hand(s: tuple[float, ...], k: int, expected: tuple[float, ...]) -> None:
    np.testing.assert_allclose(project_capped(torch.tensor(s).double(), k), expected, atol=1e-9)
    np.testing.assert_allclose(oracle.project(np.array(s, float), k), expected, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_projection_is_feasible_idempotent_non_expansive_and_the_oracle_s(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b, k = 2 * rng.normal(size=n), 2 * rng.normal(size=n), int(rng.integers(1, n + 1))
    x, y = (project_capped(torch.tensor(v), k) for v in (a, b))
    np.testing.assert_allclose(x, oracle.project(a, k), atol=1e-9)
    assert float(x.sum()) <= k + 1e-9 and float(x.min()) >= 0 and float(x.max()) <= 1
    torch.testing.assert_close(project_capped(x, k), x)
    assert float((x - y).norm()) <= np.linalg.norm(a - b) + 1e-9


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ((0.0, 0.0, 0.0), (-0.6944444444, 0.1388888889, 0.5555555556)),
        ((1.0, 0.0, -1.0), (-0.2029217451, -0.1069618262, 0.3098835713)),
    ],
)
def test_reinforce_is_unbiased(logits: tuple[float, ...], expected: tuple[float, ...]) -> None:
    losses = {frozenset({0, 1}): 1.0, frozenset({0, 2}): 2.0, frozenset({1, 2}): 4.0}
    at = torch.tensor(logits, dtype=torch.float64)
    np.testing.assert_allclose(oracle.expected_reinforce(at.numpy(), 2, losses.__getitem__), expected, atol=1e-8)
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(1500):
        orders = [(at + gumbel(3, rng)).argsort(descending=True)[:2] for _ in range(2)]
        values = torch.tensor([losses[frozenset(order.tolist())] for order in orders], dtype=torch.float64)
        found.append(reinforce_slope(at, orders, values))
    draws = torch.stack(found)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - torch.tensor(expected)).abs() < 4 * error).all()
    assert float(draws.sum(1).abs().max()) < 1e-12
    assert float(log_order_slope(at, torch.tensor([2, 0, 1])).sum()) == pytest.approx(0, abs=1e-12)


def test_the_guard_takes_the_latest_where_held_out_data_say_so() -> None:
    points = (10.0, 0.0, 1.0, 2.0)
    assert search(10.0, points, k=1, held_out=[1.5]) == [0, 0, 0, 1]
    assert search(10.0, points, k=1, held_out=[1.5], fallback=False) == [1, 0, 0, 0]


class Counting:
    """A loss that counts how often it was asked, with and without a gradient."""

    def __init__(self) -> None:
        self.gradients = self.values = 0

    def __call__(self, weights: dict[str, Tensor], target: float) -> Tensor:
        asked = weights["w"].requires_grad
        self.gradients, self.values = self.gradients + asked, self.values + (not asked)
        return bowl(weights, target)


def test_costs_are_those_that_are_told() -> None:
    loss = Counting()
    search(1.5, k=2, loss=loss, iters=40, samples=2, **FREE)
    assert (loss.gradients, loss.values) == (80, 0)
    for method, knobs, batches, expected in [
        ("lawa", {"last": 2}, [1.5], (0, 0)),
        ("best", {}, [1.5, 2.0], (0, 8)),
        ("greedy", {"fallback": False}, [1.5], (0, 7)),
        ("window", {"fallback": False}, [1.5], (0, 10)),
        ("quadratic", {"fallback": False}, [1.5, 1.0], (10, 4)),  # best subset and best window are one
        ("sewa", {"k": 4}, [1.5], (0, 0)),
    ]:
        loss = Counting()
        average_state_dicts(toys(), method=method, loss=loss, batches=batches, **knobs)
        assert (loss.gradients, loss.values) == expected, method


def plain(weights: dict[str, Tensor], target: float) -> float:
    return float((weights["w"].detach() - target).square().sum())


@pytest.mark.parametrize("method", ["best", "greedy", "window", "random"])
def test_plain_numbers_are_enough_where_no_gradient_is_followed(method: str) -> None:
    known = {"k": 2} if method == "random" else {}
    assert sum(search(1.5, method=method, loss=plain, **known)) == 1


def test_plain_numbers_are_enough_for_reinforce_and_refused_elsewhere_with_its_name() -> None:
    assert chosen(search(1.5, k=2, loss=plain, estimator="reinforce")) == {1, 2}
    for method in ("sewa", "simplex", "quadratic"):
        with pytest.raises(UnsupportedError, match="reinforce"):
            search(1.5, method=method, loss=plain)


def test_a_free_number_is_the_best_on_the_curve() -> None:
    for seed in range(3):
        assert search(1.5, k="auto", seed=seed) == [0, 0.5, 0.5, 0]
        found = search(1.0, k="auto", seed=seed)
        assert sum(c * x for c, x in zip(found, POINTS)) == pytest.approx(1, abs=1e-3)
    assert search(2.0, (2.0, 2.0, 2.0), k="auto") in ([1, 0, 0], [0, 1, 0], [0, 0, 1])  # ties go to the smaller number


def test_order_and_shift_do_not_matter() -> None:
    backwards = search(1.5, POINTS[::-1], k=2)
    assert chosen(backwards) == {1, 2}
    assert chosen(search(10_001.5, [x + 10_000 for x in POINTS], k=2)) == {1, 2}
    assert chosen(search(10_001.0, [x + 10_000 for x in POINTS], k=3)) == {0, 1, 2}


@pytest.mark.parametrize("estimator", ["exact_k", "bernoulli", "soft", "published"])
@pytest.mark.parametrize("start", ["prior", "stride", "random"])
def test_starts_temperatures_and_projections_are_walked_through(estimator: str, start: str) -> None:
    knobs = {"estimator": estimator, "start": start, "project": True, "tau_final": 0.1, "iters": 10}
    assert len(chosen(search(1.0, k=2, **knobs))) in (1, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "k is 5, but there are 4 checkpoints.*save_total_limit"),
        ({"k": 0}, "k"),
        ({"tau": 0.0}, "tau"),
        ({"iters": 0}, "iters"),
        ({"estimator": "reinforce", "samples": 1}, "samples is 1"),
        ({"loss": None}, "learns its coefficients from a loss"),
        ({"batches": []}, "^batches is empty"),
        ({"batches": None}, "^batches is empty"),
        ({"loss": lambda _, target: torch.tensor(target, requires_grad=True) ** 2}, "does not look at the weights"),
        ({"loss": lambda w, t: (torch.ones(1, requires_grad=True) * w["w"].detach()).sum()}, "no gradient in the w"),
        ({"loss": lambda w, t: (0 * w["w"]).sum() + t}, "gradient of zero in all weights"),
        ({"loss": lambda w, t: w["w"] - t, "points": (1.0, 2.0)}, "."),
        ({"loss": lambda w, t: (w["w"].expand(2) - t) ** 2}, "one number"),
    ],
)
def test_wrong_requests_are_one_clear_line(changes: dict[str, Any], message: str) -> None:
    if "points" in changes:
        assert search(1.5, k=1, **changes)  # a loss of shape [1] is one number
        return
    with pytest.raises(ModicumError, match=message) as error:
        search(1.5, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["sewa", "greedy", "best", "window", "simplex", "quadratic"])
def test_a_checkpoint_that_is_not_finite_is_named(method: str) -> None:
    def broken(weights: dict[str, Tensor], target: float) -> Tensor:
        return bowl(weights, target) / (weights["w"] != 1).all()

    if method not in ("simplex", "quadratic"):  # which look at means of several alone
        with pytest.raises(CheckpointError, match=r"The loss of checkpoints\[1\] is not finite"):
            search(1.5, method=method, loss=broken, **({"k": 1} if method == "sewa" else {}))
    with pytest.raises(CheckpointError, match=r"checkpoints\[2\].*NaN"):
        search(1.5, (0.0, 1.0, float("nan"), 2.0), method=method)


def test_a_rule_that_draws_too_many_is_refused() -> None:
    with pytest.raises(RecipeError, match="random: k is 5"):
        average_state_dicts(toys(), method="random", k=5)
