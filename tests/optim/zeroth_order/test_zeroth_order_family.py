"""The members that shape dense directions, each against its formulas."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from zeroth_order_models import matrix

from modicum.errors import RecipeError, UnsupportedError
from modicum.optim import FZOO, ConMeZO, HiZOO, SparseMeZO, ZOAdaMU
from modicum.optim.zeroth_order.leaves import Leaf
from modicum.optim.zeroth_order.perturb import PerturbedOptimizer
from modicum.optim.zeroth_order.zo_adamu import schedule
from oracles import zeroth_order as oracle


def draws(optimizer, steps, queries=1):
    """What the method starts from, before it shapes its directions."""
    leaf = optimizer.leaves[0]
    return [
        [
            torch.cat([PerturbedOptimizer._direction(optimizer, leaf, c, (t, q)) for c in leaf.chunks]).numpy()
            for q in range(queries)
        ]
        for t in range(steps)
    ]


@pytest.mark.oracle("zeroth_order", "hizoo")
@pytest.mark.parametrize("sign", [1, -1], ids=["convex", "concave"])
def test_hizoo_equals_its_formulas(sign):
    weight, convex = matrix(5, 4)

    def loss(values):
        return sign * convex(values)

    start = weight.detach().numpy().copy()
    optimizer = HiZOO([("w", weight)], lr=1e-3, smooth=0.05)
    zs = [z for (z,) in draws(optimizer, 12)]
    for _ in zs:
        optimizer.step(lambda: loss(weight.detach()))
    expected = oracle.hizoo(loss, start, zs, lr=1e-3, rho=1e-3, smooth=0.05)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


@pytest.mark.oracle("zeroth_order", "fzoo")
def test_fzoo_equals_its_formulas():
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = FZOO([("w", weight)], lr=1e-3, queries=4)
    batches = draws(optimizer, 8, queries=4)
    assert set(np.unique(batches[0])) == {-1.0, 1.0}
    for _ in batches:
        optimizer.step(lambda: loss(weight.detach()))
    expected = oracle.fzoo(loss, start, batches, lr=1e-3, rho=1e-4)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


def test_fzoo_stands_still_on_a_flat_loss():
    weight, _ = matrix()
    before = weight.detach().clone()
    optimizer = FZOO([("w", weight)], lr=1e-3)
    optimizer.step(lambda: torch.tensor(1.0))
    assert optimizer.skipped == 0
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-14)
    with pytest.raises(RecipeError, match="queries is 1, expected a whole number of at least 2"):
        FZOO([("w", weight)], lr=1e-3, queries=1)


@pytest.mark.oracle("zeroth_order", "conmezo")
def test_conmezo_equals_its_formulas():
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = ConMeZO([("w", weight)], lr=1e-3, angle=1.2, beta=0.9)
    zs = [z for (z,) in draws(optimizer, 12)]
    for _ in zs:
        optimizer.step(lambda: loss(weight.detach()))
    expected = oracle.conmezo(loss, start, zs, lr=1e-3, rho=1e-3, angle=1.2, beta=0.9)
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-8)


def test_sparse_mezo_moves_the_small_weights_only():
    weight = nn.Parameter(torch.tensor([[0.1, -0.2, 3.0, -4.0]], dtype=torch.float64))
    optimizer = SparseMeZO([("w", weight)], lr=1e-2, density=0.5)
    before, seen = weight.detach().clone(), []

    def closure():
        seen.append(weight.detach().clone())
        return weight.detach().square().sum()

    optimizer.step(closure)
    assert torch.equal(weight[0, 2:], before[0, 2:]) and (weight[0, :2] != before[0, :2]).all()
    assert all(torch.equal(values[0, 2:], before[0, 2:]) for values in seen)


@pytest.mark.oracle("zeroth_order", "sparse_mezo")
def test_sparse_mezo_with_everything_kept_is_mezo():
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = SparseMeZO([("w", weight)], lr=1e-3, density=1.0)
    (z,) = draws(optimizer, 1)[0]
    # The largest weight is the threshold, so the first step moves all.
    optimizer.step(lambda: loss(weight.detach()))
    expected = oracle.dense(loss, start, [z], lr=1e-3, rho=1e-3, variant="sgd")[-1]
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.oracle("zeroth_order", "zo_adamu")
def test_adamu_equals_its_formulas():
    weight, loss = matrix(5, 4)
    expected = weight.detach().numpy().copy()
    optimizer = ZOAdaMU([("w", weight)], lr=1e-3, hold=2, fall=4)
    leaf, last = optimizer.leaves[0], np.zeros((5, 4))
    for t in range(10):
        alpha, b1, b2 = schedule(t, hold=2, fall=4)
        (chunk,) = leaf.chunks
        fresh = leaf.draw(chunk, seed=0, step=t, query=0).numpy() * math.sqrt(alpha)
        around = last + math.sqrt(1 - alpha) * leaf.draw(chunk, seed=0, step=t, query=0, purpose="around").numpy()
        last = b1 * fresh + (1 - b1) * around
        kappa = oracle.coefficient(loss, expected, last, 1e-3)
        expected -= 1e-3 * kappa * last / np.sqrt(b2 * fresh**2 + (1 - b2) * around**2 + 1e-8)
        optimizer.step(lambda: loss(weight.detach()))
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-7)


def test_directions_that_depend_on_the_state_cannot_be_prepared_ahead():
    from modicum.optim.zeroth_order.settings import Settings

    with pytest.raises(UnsupportedError, match="passes=2 needs"):
        Settings(lr=1e-3, eps=1e-3, passes=2).check([], "HiZOO", shaped=True)


def test_conmezo_measures_the_momentum_over_all_tensors():
    a, b = matrix(4, 3)[0], nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = ConMeZO([("a", a), ("b", b)], lr=1e-3, angle=1.2)
    optimizer.step(lambda: a.detach().square().sum() + b.detach().sum())
    length = math.sqrt(sum(parts[0].square().sum().item() for parts in optimizer.dense_memory.values()))
    for leaf in optimizer.leaves:
        (chunk,) = leaf.chunks
        mean = math.sqrt(17) * optimizer.dense_memory[leaf.name][0] / length
        expected = math.cos(1.2) * mean + math.sin(1.2) * leaf.draw(chunk, seed=0, step=1, query=0)
        torch.testing.assert_close(optimizer._direction(leaf, chunk, (1, 0)), expected)


def test_sparse_mezo_looks_up_the_small_weights_at_every_step():
    weight = nn.Parameter(torch.tensor([[0.1, -0.2, 3.0, -4.0]], dtype=torch.float64))
    optimizer = SparseMeZO([("w", weight)], lr=1e-2, density=0.5)
    optimizer.step(lambda: weight.detach().square().sum())
    with torch.no_grad():
        weight.copy_(torch.tensor([[0.1, -5.0, 0.05, -4.0]]))
    before = weight.detach().clone()
    optimizer.step(lambda: weight.detach().square().sum())
    assert ((weight != before) == torch.tensor([[True, False, True, False]])).all()


def test_the_schedule_of_adamu_falls_along_its_three_curves():
    expected = [0.5 + 0.5 * math.cos(math.pi * 0.3**power) for power in (1.0, 0.1, 1.5)]
    np.testing.assert_allclose(schedule(8, hold=5, fall=10), expected)


def test_adamu_stands_still_where_nothing_was_drawn(monkeypatch):
    weight, loss = matrix()
    before = weight.detach().clone()
    monkeypatch.setattr(Leaf, "draw", lambda leaf, chunk, **_: torch.zeros_like(leaf.local()[chunk.rows]))
    ZOAdaMU([("w", weight)], lr=1e-3).step(lambda: loss(weight.detach()))
    assert torch.equal(weight.detach(), before)
