import numpy as np
import pytest
import torch
from torch import nn
from zeroth_order_models import flat, matrix, train

from modicum.errors import RecipeError
from modicum.optim import MeZO
from modicum.optim.zeroth_order.leaves import CHUNK
from oracles import zeroth_order as oracle


def directions(optimizer, steps, query=0):
    leaf = optimizer.leaves[0]
    return [
        torch.cat([optimizer._direction(leaf, chunk, (t, query)) for chunk in leaf.chunks]).numpy()
        for t in range(steps)
    ]


@pytest.mark.oracle("zeroth_order", "mezo")
@pytest.mark.parametrize("variant", ["sgd", "momentum", "adam", "lion", "scalar"])
def test_every_variant_equals_its_formulas(variant):
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = MeZO([("w", weight)], lr=1e-3, variant=variant)
    expected = oracle.dense(loss, start, directions(optimizer, 30), lr=1e-3, rho=1e-3, variant=variant)
    for values in expected:
        optimizer.step(lambda: loss(weight.detach()))
        np.testing.assert_allclose(weight.detach().numpy(), values, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sides", [1, 2])
def test_several_queries_are_averaged(sides):
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = MeZO([("w", weight)], lr=1e-3, queries=3, sides=sides)
    zs = [directions(optimizer, 1, query)[0] for query in range(3)]
    optimizer.step(lambda: loss(weight.detach()))
    if sides == 2:
        steps = [oracle.coefficient(loss, start, z, 1e-3) * z for z in zs]
    else:
        steps = [(loss(start + 1e-3 * z) - loss(start)) / 1e-3 * z for z in zs]
    np.testing.assert_allclose(weight.detach().numpy(), start - 1e-3 * sum(steps) / 3, rtol=1e-9)
    assert optimizer.kappas.shape == (3,)


def test_the_scalar_second_moment_is_the_mean_square_of_the_queries():
    weight, loss = matrix(5, 4)
    start = weight.detach().numpy().copy()
    optimizer = MeZO([("w", weight)], lr=1e-3, variant="scalar", queries=3)
    zs = [directions(optimizer, 1, query)[0] for query in range(3)]
    optimizer.step(lambda: loss(weight.detach()))
    kappas = np.array([oracle.coefficient(loss, start, z, 1e-3) for z in zs])
    # The first step's bias correction undoes the moving average, so the divisor is the root mean square itself.
    step = sum(kappa * z for kappa, z in zip(kappas, zs)) / 3 / (np.sqrt(np.mean(kappas**2)) + 1e-8)
    np.testing.assert_allclose(weight.detach().numpy(), start - 1e-3 * step, rtol=1e-9)


def test_the_estimate_is_unbiased():
    weight = nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    gradient = torch.arange(6, dtype=torch.float64).view(3, 2)
    optimizer = MeZO([("w", weight)], lr=1.0)
    count = 20_000
    total = torch.zeros_like(gradient)
    leaf = optimizer.leaves[0]
    for t in range(count):
        z = torch.cat([optimizer._direction(leaf, chunk, (t, 0)) for chunk in leaf.chunks])
        total += (gradient * z).sum() * z
    torch.testing.assert_close(total / count, gradient, rtol=0, atol=0.4)


def test_large_tensors_are_drawn_in_chunks_that_do_not_repeat():
    optimizer = MeZO([("w", nn.Parameter(torch.zeros(3, CHUNK // 2)))], lr=1e-3)
    leaf = optimizer.leaves[0]
    parts = [optimizer._direction(leaf, chunk, (0, 0)) for chunk in leaf.chunks]
    assert [len(part) for part in parts] == [2, 1]
    assert not torch.equal(parts[0][:1], parts[1])


def test_a_dense_method_has_no_adapter_engine():
    with pytest.raises(RecipeError, match=r"engine is 'adapter'\. Known: jvp, mutate"):
        MeZO([("w", matrix()[0])], lr=1e-3, engine="adapter")
    with pytest.raises(RecipeError, match="variant is 'rms'"):
        MeZO([("w", matrix()[0])], lr=1e-3, variant="rms")


def test_two_runs_with_one_seed_are_equal_and_with_two_seeds_differ():
    one, two, three = (train(MeZO, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(flat(one), flat(two)) and not torch.equal(flat(one), flat(three))
