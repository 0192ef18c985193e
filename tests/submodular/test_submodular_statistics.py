"""Sampled gradients have the mean of the exact ones, within four standard errors; worlds together are as apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modicum.submodular import (
    MAOSMA,
    MASPL,
    ConcaveOverModular,
    FacilityLocation,
    Mixture,
    ProbabilisticCoverage,
    policy_surrogate_grad,
    policy_surrogate_grad_exact,
    surrogate_grad,
    surrogate_grad_exact,
)

BLOCKS = [[0, 3], [1], [5, 2, 4]]
DRAWS = 4000
MADE = {"facility": FacilityLocation, "coverage": ProbabilisticCoverage}


def scene(kind):
    rng = np.random.default_rng(0)
    return MADE[kind](rng.random((4, 6))), torch.from_numpy(rng.random((3, 6)) / 4)


def assert_mean(samples, exact, where=...):
    error = (samples.mean(0) - exact).abs()
    allowed = 4 * samples.std(0) / len(samples) ** 0.5 + 1e-12
    assert bool((error <= allowed)[where].all()), (error / allowed).max()


@pytest.mark.parametrize("kind", MADE)
def test_a_sample_of_ma_spl_is_unbiased(kind):
    f, x = scene(kind)
    policy = MASPL(BLOCKS, torch.eye(3), eta=1e-4, seed=range(DRAWS))
    found = policy._gradient(f, x.expand(DRAWS, 3, 6), 0, "update")
    assert_mean(found, policy_surrogate_grad_exact(f, x, BLOCKS), policy.partition.valid)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("knobs", [{}, {"n_samples": 3}, {"n_samples": 3, "stratified": True}, {"surrogate": False}])
def test_samples_of_ma_osma_are_unbiased(kind, knobs):
    f, x = scene(kind)
    policy = MAOSMA(BLOCKS, torch.eye(3), eta=1e-4, seed=range(DRAWS), c=0.7, **knobs)
    found = policy._gradient(f, x.expand(DRAWS, 3, 6), 0, "update")
    exact = surrogate_grad_exact(f, x, c=0.7) if knobs.get("surrogate", True) else f.multilinear_grad(x)
    assert_mean(found, policy.partition.own(exact), policy.partition.valid)


@pytest.mark.parametrize("kind", MADE)
def test_samples_outside_of_a_policy_are_unbiased(kind):
    f, x = scene(kind)
    rng = torch.Generator().manual_seed(3)
    for stratified in (False, True):
        found = surrogate_grad(f, x[0].expand(DRAWS, 6), c=0.7, n_samples=2, stratified=stratified, rng=rng)
        assert_mean(found, surrogate_grad_exact(f, x[0], c=0.7))
    found = torch.stack([policy_surrogate_grad(f, x[0], BLOCKS, rng=rng) for _ in range(500)])
    assert_mean(found, policy_surrogate_grad_exact(f, x[0], BLOCKS))


def mixture(V, *, weights):
    return Mixture([FacilityLocation(V, weights=weights), ProbabilisticCoverage(V, weights=weights)], [0.5, 2])


@pytest.mark.parametrize("made", [FacilityLocation, ProbabilisticCoverage, ConcaveOverModular, mixture])
@pytest.mark.parametrize("weights", ["none", "shared", "by world"])
def test_worlds_together_equal_worlds_apart(made, weights):
    rng = torch.Generator().manual_seed(5)
    V, x = (torch.rand(3, count, 5, generator=rng, dtype=torch.float64) for count in (4, 2))
    masks = torch.rand(3, 7, 5, generator=rng) < 0.5
    w = {"none": None, "shared": torch.rand(4, generator=rng), "by world": torch.rand(3, 4, generator=rng)}[weights]
    together = made(V, weights=w)
    apart = [made(V[i], weights=w[i] if weights == "by world" else w) for i in range(3)]

    def same(ask):
        torch.testing.assert_close(ask(together, ...), torch.stack([ask(f, i) for i, f in enumerate(apart)]))

    same(lambda f, i: f.value(masks[i]))
    same(lambda f, i: f.gains(masks[i], [0, 3]))
    same(lambda f, i: f.first_gains())
    same(lambda f, i: f.last_gains())
    same(lambda f, i: torch.as_tensor(f.curvature(), dtype=torch.float64))
    if together.exact:
        same(lambda f, i: f.multilinear(x[i]))
        same(lambda f, i: f.multilinear_grad(x[i]))
        same(lambda f, i: policy_surrogate_grad_exact(f, x[i] / 3, [2, 3]))
