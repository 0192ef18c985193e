"""Bad input gets one line that names the offender."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from modicum.errors import ModicumError, UnsupportedError
from modicum.submodular import (
    BSG,
    MAOSEA,
    MAOSMA,
    MASPL,
    OSG,
    ConcaveOverModular,
    FacilityLocation,
    Hedge,
    LastGreedy,
    Mixture,
    ProbabilisticCoverage,
    Random,
    Simulated,
    WeightedCover,
    check_axioms,
    from_callable,
    greedy,
    max_degree_weights,
    metropolis_weights,
    ring,
    sample_actions,
    sequential_greedy,
    simulate,
    surrogate_grad_exact,
    surrogate_ratio,
    theory_step,
)
from modicum.submodular.graphs import check_weights

W = [[0.5, 0.5], [0.5, 0.5]]
F = FacilityLocation([[1.0, 0, 0, 0], [0, 1, 1, 0]])


class Falling:
    n = 4

    def value(self, mask):
        return float(mask.sum())

    def gains(self, mask, block):
        return torch.tensor([-1.0 if a == 2 else 1.0 for a in block.tolist()])


class Full(Falling):
    def value(self, mask):
        return 7.0


def policy(**knobs):
    return MAOSMA([2, 2], W, **{"eta": 0.1} | knobs)


BAD = {
    "blocks overlap": (lambda: policy_of([[0, 1], [1, 2]]), "element 1 stands twice, with agent 0 and agent 1"),
    "an element twice": (lambda: policy_of([[0, 0], [1, 2]]), "element 0 stands twice, with agent 0"),
    "an empty block": (lambda: policy_of([[0, 1], []]), "agent 1 has no action"),
    "a block of no size": (lambda: policy_of([2, 0]), "agent 1 has 0 actions"),
    "blocks with a gap": (lambda: policy_of([[0, 1], [3, 4]]), "element 2 belongs to no agent"),
    "mixed blocks": (lambda: policy_of([2, [2, 3]]), "mix sizes and lists"),
    "no blocks": (lambda: policy_of([]), "expected at least one agent"),
    "weights of another size": (lambda: MAOSMA([2, 2], np.eye(3), eta=1), "for 3 agents, but there are blocks of 2"),
    "rows that do not sum to one": (lambda: MAOSMA([2, 2], [[0.5, 0.4], [0.5, 0.6]], eta=1), "row 0 sums to 0.9"),
    "columns that do not": (lambda: MAOSMA([2, 2], [[0.5, 0.5], [0.4, 0.6]], eta=1), "column 0 sums to 0.9"),
    "one-way weights": (
        lambda: MAOSMA([1] * 3, 0.5 * np.eye(3) + 0.5 * np.roll(np.eye(3), 1, 1), eta=1),
        "W[0, 1] is 0.5, but W[1, 0] is 0",
    ),
    "weights that swap": (lambda: MAOSMA([2, 2], [[0, 1], [1, 0]], eta=1), "β = 1: agents 0 and 1 swap their copies"),
    "negative weights": (lambda: MAOSMA([2, 2], [[1.5, -0.5], [-0.5, 1.5]], eta=1), "W[0, 1] is -0.5"),
    "weights that are no numbers": (lambda: MAOSMA([2, 2], [[math.nan, 1], [1, 0]], eta=1), "W[0, 0] is nan"),
    "no square": (lambda: MAOSMA([2, 2], [[1, 0]], eta=1), "expected (N, N)"),
    "weights off the graph": (
        lambda: check_weights(np.full((3, 3), 1 / 3), adjacency=[[0, 1, 0], [1, 0, 1], [0, 1, 0]]),
        "W[0, 2] is 0.333333, but agents 0 and 2 are no neighbours",
    ),
    "parts": (
        lambda: MAOSMA([1] * 4, np.kron(np.eye(2), np.full((2, 2), 0.5)), eta=1),
        "not connected: its parts are {0, 1}; {2, 3}",
    ),
    "a graph in parts": (lambda: metropolis_weights(np.kron(np.eye(2), np.ones((2, 2)))), "{0, 1}; {2, 3}"),
    "a one-way link": (lambda: max_degree_weights([[0, 1], [0, 0]]), "not symmetric at [0, 1]"),
    "a curvature above one": (lambda: policy(c=1.5), "c is 1.5, expected a number in [0, 1]"),
    "a curvature that is no number": (lambda: surrogate_ratio(math.nan), "c is nan"),
    "a step of nothing": (lambda: policy(eta=0), "eta is 0, expected a number above 0"),
    "an infinite step": (lambda: policy(eta=math.inf), "eta is inf"),
    "steps without worlds": (lambda: policy(eta=(1.0, 2.0)), "needs as many seeds"),
    "an unknown gradient": (lambda: policy(gradient="noisy"), "gradient is 'noisy'"),
    "an unknown start": (lambda: policy(init="none"), "init is 'none'"),
    "an unknown average": (lambda: policy(consensus="some"), "consensus is 'some'"),
    "an unknown residual": (lambda: policy(residual="lost"), "residual is 'lost'"),
    "no samples": (lambda: policy(n_samples=0), "n_samples is 0"),
    "no mixing": (lambda: MAOSEA([2, 2], W, eta=1, gamma=0), "gamma is 0"),
    "all mixing": (lambda: MAOSEA([2, 2], W, eta=1, gamma=1), "gamma is 1, expected a number in [0, 1)"),
    "an unknown mix": (lambda: MAOSEA([2, 2], W, eta=1, mix="all"), "mix is 'all'"),
    "a negative value": (lambda: FacilityLocation([[1, -2]]), "V[0, 1] is -2"),
    "a value that is none": (lambda: FacilityLocation([[1, math.nan]]), "V[0, 1] is nan"),
    "no rows": (lambda: FacilityLocation(np.zeros((0, 3))), "expected (rows, elements)"),
    "wrong weights": (lambda: FacilityLocation([[1.0]], weights=[1, 2]), "expected (1,), one for each row"),
    "negative row weights": (lambda: FacilityLocation([[1.0]], weights=[-1]), "negative or not finite"),
    "columns outside": (lambda: FacilityLocation([[1.0]], columns=[0, 1]), "outside 0 … 0"),
    "a probability above one": (lambda: ProbabilisticCoverage([[2.0]]), "P[0, 0] is 2, expected numbers in [0, 1]"),
    "half a cover": (lambda: WeightedCover([[0.5]]), "other than 0 and 1"),
    "phi without tau": (lambda: ConcaveOverModular([[1.0]], phi="min"), "tau belongs to phi='min'"),
    "an unknown phi": (lambda: ConcaveOverModular([[1.0]], phi="cube"), "phi is 'cube'"),
    "a mixture of strangers": (lambda: Mixture([F, FacilityLocation([[1.0]])]), "same elements"),
    "a mixture of names": (lambda: Mixture([F, Falling()]), "a mixture of Falling: expected set functions"),
    "a mixture of nothing": (lambda: Mixture([]), "0 functions"),
    "an empty set of value": (lambda: from_callable(lambda mask: 1.0, 2), "f of the empty set is 1"),
    "a value that is no number": (lambda: from_callable(lambda m: math.nan * m.sum(), 2), "is nan, expected a finite"),
    "falling gains": (lambda: policy().update(Falling()), "element 2 adds -1 to {"),
    "falling gains of ma_spl": (lambda: MASPL([2, 2], W, eta=1).update(Falling()), "element 2 adds -1 to {"),
    "falling gains of osg": (lambda: OSG([2, 2], horizon=4).update(Falling()), "element 2 adds -1 to {"),
    "f of nothing": (lambda: policy().update(Full()), "f of the empty set is 7"),
    "a callable that falls": (
        lambda: policy().update(from_callable(lambda mask: -float(mask.sum()), 4)),
        "not monotone: element 0 adds -1 to {",
    ),
    "other elements": (lambda: policy().update(FacilityLocation([[1.0]])), "has 1 elements, but the blocks cover 4"),
    "a hint of other elements": (lambda: policy().act(FacilityLocation([[1.0]])), "has 1 elements"),
    "no hint rounds": (lambda: policy().act(F, rounds=0), "rounds is 0"),
    "one round of osg": (lambda: OSG([2], horizon=1), "horizon is 1, expected at least 2"),
    "one round of bsg": (lambda: BSG([2], horizon=1), "horizon is 1, expected at least 2"),
    "a wrong order": (lambda: OSG([2, 2], horizon=4, order=[0, 0]), "order is [0, 0]"),
    "a wrong order of greedy": (lambda: sequential_greedy(F, [2, 2], order=[1]), "each of the agents 0 to 1 once"),
    "a scale of nothing": (lambda: OSG([2], horizon=4, scale=0), "scale is 0"),
    "a step of nothing of hedge": (lambda: Hedge([2], eta=0), "eta is 0"),
    "hedge all at random": (lambda: Hedge([2], eta=1, gamma=2), "gamma is 2"),
    "no rounds": (lambda: simulate(policy(), F), "rounds is missing"),
    "more rounds than objectives": (lambda: simulate(policy(), [F], rounds=2), "but there are 1 objectives"),
    "a wrong mask": (lambda: F.value([True, False]), "mask has shape (2,), expected (…, 4)"),
    "a wrong point": (lambda: F.multilinear([0.5]), "x has shape (1,), expected (…, 4)"),
    "a point that is no probability": (lambda: F.multilinear([1.5, 0, 0, 0]), "x holds a number outside [0, 1]"),
    "a point that is no number": (lambda: F.multilinear_grad([math.nan, 0, 0, 0]), "outside [0, 1]"),
    "elements that are none": (lambda: F.gains([True] * 4, [0, 7]), "block is [0, 7], expected elements from 0 to 3"),
    "words for values": (lambda: FacilityLocation([["a"]]), "V: [['a']] is no array"),
    "rows of two lengths": (lambda: FacilityLocation([[1, 2], [3]]), "V: [[1, 2], [3]] is no array"),
    "weights of no kind": (lambda: MAOSMA([2, 2], None, eta=1), "W: None is no array"),
    "greedy of worlds": (lambda: greedy(FacilityLocation(torch.ones(2, 3, 4)), 1), "greedy takes one world"),
    "half a pick": (lambda: greedy(F, 1.5), "k is 1.5, expected 1 to 4"),
    "a wrong x": (lambda: setattr(policy(), "x", torch.zeros(3, 4)), "x has shape (3, 4), expected (2, 4)"),
    "x outside": (lambda: setattr(policy(), "x", torch.full((2, 4), 2.0)), "outside [0, 1]"),
    "too many picks": (lambda: greedy(F, 5), "k is 5, expected 1 to 4"),
    "too few features": (lambda: FacilityLocation.from_features([[1.0]], [[1.0, 2.0]]), "X has 1 features and Y 2"),
    "an unknown kernel": (lambda: FacilityLocation.from_features([[1.0]], kernel="soft"), "kernel is 'soft'"),
    "too many neighbours": (lambda: FacilityLocation.from_features([[1.0]], neighbours=2), "neighbours is 2"),
    "losses above all": (lambda: Simulated(W, drop=2), "drop is 2"),
    "a negative delay": (lambda: Simulated(W, delay=-1), "delay is -1"),
    "an unknown precision": (lambda: Simulated(W, foreign="int8"), "foreign is 'int8'"),
    "a theory of no rounds": (lambda: theory_step(0), "T is 0"),
    "an unknown residual to draw": (lambda: sample_actions([1.0], 0.5, residual="x"), "residual is 'x'"),
    "a state of another policy": (
        lambda: policy().load_state_dict(Random([2, 2]).state_dict()),
        "the state is of Random, expected that of MAOSMA",
    ),
    "a state of a policy alike": (
        lambda: MASPL([2, 2], W, eta=1).load_state_dict(policy().state_dict()),
        "the state is of MAOSMA, expected that of MASPL",
    ),
    "half a state": (
        lambda: policy().load_state_dict({k: v for k, v in policy().state_dict().items() if k != "x"}),
        "state of MAOSMA: x is missing",
    ),
    "a state of other blocks": (lambda: policy().load_state_dict(other_state()), "x has shape (2, 5)"),
    "half a seed": (lambda: policy(seed=0.5), "seed is 0.5, expected a whole number"),
    "half a block": (lambda: policy_of([2.0, 2.5]), "blocks hold 2.0, expected sizes"),
    "too few hints": (lambda: simulate(policy(), F, rounds=2, hints=[F]), "there are 1 hints, but 2 rounds"),
    "no seeds": (lambda: policy(seed=[]), "seed is an empty list"),
    "a graph of nobody": (lambda: ring(0), "n is 0, expected a whole number above 0"),
}


def policy_of(blocks):
    return MAOSMA(blocks, W, eta=0.1)


def other_state():
    return MAOSMA([2, 3], W, eta=0.1).state_dict()


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_in_one_line(what):
    call, message = BAD[what]
    with pytest.raises(ModicumError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("made", [MAOSMA, MASPL])
def test_an_exact_gradient_needs_a_closed_form(made):
    concave = ConcaveOverModular(np.ones((1, 4)))
    for f in (from_callable(lambda mask: float(mask.sum()), 4), concave, Mixture([F, concave])):
        with pytest.raises(UnsupportedError, match="no closed form .* FacilityLocation, ProbabilisticCoverage"):
            made([2, 2], W, eta=0.1, gradient="exact").update(f)
    with pytest.raises(UnsupportedError, match="Give neighbours="):
        surrogate_grad_exact(FacilityLocation.from_features(np.eye(3)), [0.5] * 3)


def test_axioms_name_the_sets():
    good = check_axioms(F)
    assert good and not good.violations
    good.require()
    bad = check_axioms(from_callable(lambda mask: float(mask.sum()) ** 2 - 3 * float(mask[0]), 3, shift=True))
    assert not bad and not bad.monotone and not bad.submodular
    assert any("element 0 adds -2 to {}: not monotone" in line for line in bad.violations)
    with pytest.raises(ModicumError, match="not what the policies need"):
        bad.require()
    assert not check_axioms(Full()).normalised


def test_numbers_may_come_from_arrays():
    plain = policy(seed=[3, 4], eta=(0.1, 0.2))
    for made in (
        MAOSMA(np.array([2, 2]), W, eta=[0.1, 0.2], seed=np.array([3, 4])),
        MAOSMA(torch.tensor([2, 2]), torch.tensor(W), eta=torch.tensor([0.1, 0.2]).double(), seed=torch.tensor([3, 4])),
    ):
        assert torch.equal(simulate(made, F, rounds=3).actions, simulate(plain, F, rounds=3).actions)
        plain.load_state_dict(policy(seed=[3, 4], eta=(0.1, 0.2)).state_dict())
    one = [
        simulate(policy(seed=seed), F, rounds=3, hints=hints).actions
        for seed, hints in ((3, [F] * 3), (np.int64(3), F))
    ]
    assert torch.equal(*one)
    assert Hedge([2, 2], eta=[1.0, 2.0], seed=[0, 1]).worlds == OSG([2], horizon=4, scale=[1, 2], seed=[0, 1]).worlds


@pytest.mark.parametrize("made", [lambda: OSG([2, 2], horizon=4), lambda: LastGreedy([2, 2]), lambda: late()])
def test_a_policy_goes_back_to_before_its_first_round(made):
    one = made()
    start = {name: part.clone() for name, part in one.state_dict().items()}
    first = simulate(one, F, rounds=3).actions
    one.load_state_dict(start)
    assert torch.equal(simulate(one, F, rounds=3).actions, first)


def late():
    return MAOSMA([2, 2], Simulated(W, delay=1), eta=0.1)
