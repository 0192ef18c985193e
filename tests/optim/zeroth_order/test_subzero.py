import numpy as np
import pytest
import torch
from zeroth_order_models import matrix

from modicum.errors import RecipeError
from modicum.optim import SubZero
from modicum.optim.zeroth_order.lifts import Core
from oracles import zeroth_order as oracle


def cores(optimizer, steps, query=0):
    basis = [f.numpy() for f in optimizer.leaves[0].basis]
    draws = [optimizer._coordinates((t, query)).view(2, 2).numpy() for t in range(steps)]
    return [basis[0] @ s @ basis[1].T for s in draws]


@pytest.mark.oracle("zeroth_order", "subzero")
@pytest.mark.parametrize(("scale", "factor"), [("unit", 30**0.5 / 2), ("none", 1.0)])
def test_subzero_equals_its_formula(scale, factor):
    weight, loss = matrix(6, 5)
    start = weight.detach().numpy().copy()
    optimizer = SubZero([("w", weight)], lr=1e-3, rank=2, scale=scale)
    zs = [factor * z for z in cores(optimizer, 12)]
    expected = oracle.dense(loss, start, zs, lr=1e-3, rho=1e-3, variant="sgd")
    for values in expected:
        optimizer.step(lambda: loss(weight.detach()))
        np.testing.assert_allclose(weight.detach().numpy(), values, rtol=1e-9)


def test_subzero_plus_is_adam_on_the_core_of_one_sided_queries():
    weight, loss = matrix(6, 5)
    start = weight.detach().numpy().copy()
    optimizer = SubZero([("w", weight)], lr=1e-2, rank=2, variant="adam", queries=5, sides=1, scale="none")
    left, right = (f.numpy() for f in optimizer.leaves[0].basis)
    estimate = 0
    for query in range(5):
        core = optimizer._coordinates((0, query)).view(2, 2).numpy()
        estimate = estimate + (loss(start + 1e-3 * left @ core @ right.T) - loss(start)) / 1e-3 * core / 5
    optimizer.step(lambda: loss(weight.detach()))
    # The first corrected Adam step is the sign of the estimate.
    expected = start - 1e-2 * left @ (estimate / (np.abs(estimate) + 1e-8)) @ right.T
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-8)


def test_the_subspace_is_orthonormal_and_new_after_a_refresh():
    weight, loss = matrix(6, 5)
    optimizer = SubZero([("w", weight)], lr=1e-3, rank=2, refresh_every=2)
    before = optimizer.leaves[0].basis
    for factor in before:
        torch.testing.assert_close(factor.mT @ factor, torch.eye(2, dtype=torch.float64))
    for _ in range(3):
        optimizer.step(lambda: loss(weight.detach()))
    expected = Core().basis((6, 5), rank=2, seed=0, name="w", epoch=1)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.leaves[0].basis, expected, strict=True))


def test_an_unknown_variant_is_refused():
    with pytest.raises(RecipeError, match="variant is 'lion'"):
        SubZero([("w", matrix()[0])], lr=1e-3, variant="lion")
