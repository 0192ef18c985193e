"""Objectives of a user's own: three names suffice, nothing is remembered of them, and what is wrong is refused."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from modicum.errors import RecipeError
from modicum.submodular import (
    MAOSMA,
    MASPL,
    OSG,
    FacilityLocation,
    Random,
    WeightedCover,
    from_callable,
    greedy,
    metropolis_weights,
    ring,
    sequential_greedy,
    simulate,
)
from modicum.submodular.functions import SetFunction
from modicum.submodular.policies.make import make_policy

W = [[0.5, 0.5], [0.5, 0.5]]
GREEDY = ("last_greedy", "oracle_greedy", "hedge", "osg", "best_response", "rag", "ma_spl")


class Own:
    n = 4

    def value(self, mask):
        return float(mask.sum()) ** 0.5

    def gains(self, mask, block):
        out = []
        for a in block.tolist():
            rest = mask.clone()
            rest[a] = False
            out.append(float(rest.sum() + 1) ** 0.5 - float(rest.sum()) ** 0.5)
        return out


class Weighing(Own):
    """A modular objective that its owner changes in place; it is a world too."""

    def __init__(self):
        self.w, self.blocks = torch.tensor([1.0, 0, 0, 0]), [2, 2]

    def value(self, mask):
        return float((self.w * mask).sum())

    def gains(self, mask, block):
        return [float(self.w[a]) for a in block.tolist()]

    def objective(self):
        return self

    def step(self, actions):
        self.w = 2 * self.w.roll(1)


class Lifted(SetFunction):
    n = 4

    def value(self, mask):
        return 7.0 + self._mask(mask).sum(-1).double()

    def gains(self, mask, block):
        return torch.ones(*self._mask(mask).shape[:-1], len(block), dtype=torch.float64)


def act_and_learn(name, f):
    made = make_policy(name, [2, 2], W=W, horizon=4, knobs={"eta": 1.0} if name in ("hedge", "ma_spl") else {})
    made.act(f if name == "oracle_greedy" else None)
    made.update(f)
    return made


@pytest.mark.parametrize("made", [MAOSMA([2, 2], W, eta=0.1), MASPL([2, 2], W, eta=0.1), OSG([2, 2], horizon=4)])
def test_an_objective_of_ones_own_needs_three_names(made):
    trace = simulate(made, Own(), rounds=3, optimum="auto")
    assert trace.utility.tolist() == pytest.approx([2**0.5] * 3) and trace.optimum_kind == "exact"
    assert trace.optimum.tolist() == pytest.approx([2**0.5] * 3)


def test_several_worlds_share_an_objective_of_ones_own():
    trace = simulate(MASPL([2, 2], W, eta=0.1, seed=[0, 1, 2]), Own(), rounds=2, optimum="exact")
    torch.testing.assert_close(trace.utility, torch.full((2, 3), 2**0.5, dtype=torch.float64))
    torch.testing.assert_close(trace.ratio(), torch.ones(3, dtype=torch.float64))


def test_an_objective_may_change_in_place():
    def learn(f, g):
        made = MASPL([2, 2], W, eta=0.1, consensus="owner")
        made.update(f)
        if g is f:
            f.step(None)
        made.update(g)
        return made.x

    other = Weighing()
    other.step(None)
    one = Weighing()
    assert torch.equal(learn(one, one), learn(Weighing(), other))
    trace = simulate(Random([2, 2]), Weighing(), rounds=4, optimum="exact")
    assert trace.optimum.tolist() == [1.0, 2.0, 4.0, 8.0]


def test_an_objective_below_zero_has_an_exact_optimum_or_none():
    with pytest.raises(RecipeError, match="adds -3 to {"):
        simulate(MAOSMA([2, 2], W, eta=1), from_callable(lambda mask: -3 * float(mask.sum()), 4), rounds=1)
    trace = simulate(Random([2, 2]), from_callable(lambda mask: -3 * float(mask.sum()), 4), rounds=1, optimum="exact")
    assert trace.optimum.tolist() == [-6.0]


@pytest.mark.parametrize("name", GREEDY)
def test_policies_refuse_gains_that_are_negative_or_no_numbers(name):
    for gain in (-1.0, math.nan):
        own = type("Bad", (Own,), {"gains": lambda _, mask, block, gain=gain: [gain if a == 3 else 1.0 for a in block]})
        with pytest.raises(RecipeError, match=f"element 3 adds {gain:g} to"):
            act_and_learn(name, own())
    with pytest.raises(RecipeError, match="adds -1 to {"):
        act_and_learn(name, from_callable(lambda mask: -float(mask.sum()), 4))
    with pytest.raises(RecipeError, match="f of the empty set is 7"):
        act_and_learn(name, Lifted())


def test_greedy_refuses_what_is_not_submodular():
    square = from_callable(lambda mask: float(mask.sum()) ** 2, 3)
    with pytest.raises(RecipeError, match=re.escape("element 1 adds 3 to {0}, but 1 to some of them")):
        greedy(square, 2)
    with pytest.raises(RecipeError, match="element 0 adds 5 to {1, 2}, but 1 alone"):
        square.curvature()
    with pytest.raises(RecipeError, match="not monotone: element 0 adds -1 to {1, 2}"):
        from_callable(lambda mask: float(mask.sum()) * (3 - float(mask.sum())) / 2, 3).curvature()
    with pytest.raises(RecipeError, match="f of the empty set is 7"):
        sequential_greedy(Lifted(), [2, 2])
    # In float32 the gains of a sum rise by rounding, which is no offence.
    V = torch.rand(2000, 12, generator=torch.Generator().manual_seed(0)) * 100
    assert len(greedy(from_callable(lambda mask: V[:, mask].sum(1).sqrt().sum() if mask.any() else 0.0, 12), 12)) == 12


def test_values_must_be_finite():
    own = type("Bad", (Own,), {"value": lambda _, mask: math.nan if mask[0] and mask[2] else 0.0})
    with pytest.raises(RecipeError, match=re.escape("f of {0, 2} is nan, expected a finite number")):
        simulate(Random([2, 2]), own(), rounds=1, optimum="exact")


def test_worlds_of_the_objective_are_those_of_the_policy():
    f = FacilityLocation(torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(RecipeError, match="the objective is of 3 worlds, but the policy of one world"):
        MASPL([2, 2, 2], metropolis_weights(ring(3)), eta=0.1).update(f)
    with pytest.raises(RecipeError, match="of 3 worlds, but the policy of 2 worlds, one for each seed"):
        MASPL([2, 2, 2], metropolis_weights(ring(3)), eta=0.1, seed=[0, 1]).update(f)


def test_a_kernel_of_ones_own_is_checked_and_left_alone():
    table = torch.tensor([[1.0, -0.5], [0.25, 1.0]], dtype=torch.float64)
    f = FacilityLocation.from_features(np.eye(2), kernel=lambda x, y: table[x.argmax(1)])
    assert float(f.value([True, False])) == 1.0 and float(table[0, 1]) == -0.5
    arrays = FacilityLocation.from_features(np.eye(2), kernel=lambda x, y: (x @ y.T).numpy())
    assert float(arrays.value([True, False])) == 1.0
    for kernel, message in (
        (lambda x, y: table[x.argmax(1)] / 0, "kernel gave inf at"),
        (lambda x, y: x[:, :1], "kernel gave a matrix of shape (2, 1), expected (2, 2)"),
    ):
        with pytest.raises(RecipeError, match=re.escape(message)):
            greedy(FacilityLocation.from_features(np.eye(2), kernel=kernel), 1)


def test_a_cover_of_lists_is_items_or_refused():
    assert float(WeightedCover([[0, 1], [2]]).value([True, True])) == 3.0
    assert float(WeightedCover([[1, 1, 0], [0, 1, 1]]).value([True, False, False])) == 1.0
    assert float(WeightedCover(np.array([[0, 1], [0, 1]])).value([False, True])) == 2.0
    with pytest.raises(RecipeError, match=re.escape("covers starts with [0, 1], which reads as items")):
        WeightedCover([[0, 1], [0, 1]])
