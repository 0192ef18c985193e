"""What the estimators are on average; seeded, with room for chance."""

import pytest
import torch

from modicum.optim.zeroth_order.lifts import Core, Diagonal, Left, direction, relative_variance

LIFTS = {"tezo": Diagonal(), "lozo": Left(), "subzero": Core()}
COUNT = 60_000


def directions(method, m, n, rank, count=COUNT):
    """Many directions with fresh factors, of energy mn."""
    rng = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(count, *shape, generator=rng, dtype=torch.float64)

    if method == "mezo":
        return draw(m, n)
    if method == "tezo":
        return (draw(m, rank) * draw(1, rank)) @ draw(n, rank).mT / rank**0.5
    if method == "lozo":
        return draw(m, rank) @ draw(n, rank).mT / rank**0.5
    left, right = torch.linalg.qr(draw(m, rank)).Q, torch.linalg.qr(draw(n, rank)).Q
    return (m * n) ** 0.5 / rank * left @ draw(rank, rank) @ right.mT


@pytest.mark.parametrize(("m", "n", "rank"), [(4, 3, 2), (5, 6, 4)])
@pytest.mark.parametrize("method", ["mezo", "tezo", "lozo", "subzero"])
def test_estimators_are_unbiased_with_the_stated_variance(method, m, n, rank):
    gradient = torch.randn(m, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z = directions(method, m, n, rank)
    estimates = (z * gradient).sum((1, 2), keepdim=True) * z
    assert (estimates.mean(0) - gradient).norm() < 0.1 * gradient.norm()
    delta = ((estimates - gradient) ** 2).sum((1, 2)).mean() / gradient.square().sum()
    assert delta.item() == pytest.approx(relative_variance(method, m, n, rank=rank), rel=0.1)


@pytest.mark.parametrize("method", ["tezo", "lozo", "subzero"])
def test_a_lift_has_the_energy_it_states(method):
    lift, total = LIFTS[method], 0.0
    for seed in range(400):
        basis = lift.basis((6, 5), rank=3, seed=seed, name="w", epoch=0)
        rng = torch.Generator().manual_seed(seed)
        coordinates = torch.randn(lift.size((6, 5), rank=3), generator=rng, dtype=torch.float64)
        left, right = lift.factors(basis, coordinates.view(-1, 3))
        total += (left @ right.mT).square().sum().item() / 400
    assert total / 30 == pytest.approx(lift.energy((6, 5), rank=3), rel=0.1)


@pytest.mark.parametrize("method", ["tezo", "lozo", "subzero"])
def test_a_lift_is_linear(method):
    lift = LIFTS[method]
    basis = lift.basis((6, 5), rank=3, seed=0, name="w", epoch=0)
    one, two = torch.randn(
        2, lift.size((6, 5), rank=3), dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )

    def lifted(c):
        left, right = lift.factors(basis, c.view(-1, 3))
        return left @ right.mT

    torch.testing.assert_close(lifted(2 * one - 3 * two), 2 * lifted(one) - 3 * lifted(two))


def test_with_fixed_factors_the_estimate_is_a_sketch_of_the_gradient():
    left, right = Diagonal().basis((5, 4), rank=3, seed=0, name="w", epoch=0)
    gradient = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    slopes = torch.einsum("ms,mn,ns->s", left, gradient, right)
    expected = (left * slopes) @ right.mT
    taus = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    estimate = (left * ((taus @ slopes)[:, None] * taus).mean(0)) @ right.mT
    assert (estimate - expected).norm() < 0.05 * expected.norm()
    assert torch.linalg.matrix_rank(expected) <= 3


def test_what_adam_drops_has_mean_zero():
    left, right = Diagonal().basis((5, 4), rank=3, seed=0, name="w", epoch=0)
    taus = torch.randn(COUNT, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    squares = torch.zeros(5, 4, dtype=torch.float64)
    for start in range(0, COUNT, 10_000):
        part = taus[start : start + 10_000]
        squares += ((left * part[:, None]) @ right.mT).square().sum(0) / COUNT
    kept = ((left * left) * taus.square().mean(0)) @ (right * right).mT
    assert (squares - kept).abs().max() < 0.05 * kept.max()
    assert direction(left, right, taus[0], scale="none").shape == (5, 4)
