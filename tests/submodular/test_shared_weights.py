"""Policies whose agents draw from one table of weights: Exp3 on what was drawn, fixed weights, DoReMi-like weights."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from modicum.errors import RecipeError
from modicum.submodular import ODM, FacilityLocation, Fixed, Hedge, SelectionWorld
from modicum.submodular.comparison import Variant, best_step, tune
from modicum.submodular.data_selection import DomainScheduler, Needs

BLOCKS = [[0, 3], [1], [5, 2, 4]]  # uneven and out of order


@pytest.mark.oracle("policies", "odm")
def test_odm_weighs_what_was_drawn_by_its_chance():
    rng = np.random.default_rng(0)
    policy, rewards = ODM(BLOCKS, memory=0.7), np.zeros(3)
    for turn in range(12):
        expected = []
        for block in BLOCKS:
            k = len(block)
            rate = min(1 / k, np.sqrt(np.log(k) / (k * (turn + 1))))
            raised = np.exp(rate * rewards[:k])
            expected.append((1 - k * rate) * raised / raised.sum() + rate)
        np.testing.assert_allclose(policy.probabilities(), np.concatenate(expected), atol=1e-12)
        table = rng.random((4, 6))
        actions = policy.act().tolist()
        if turn % 3 == 2:  # somebody else may choose
            actions = [0, 0, 2]
            policy.overrule(torch.tensor(actions))
        policy.update(FacilityLocation(table))
        for k in set(actions):
            who = [i for i, action in enumerate(actions) if action == k]
            worth = np.mean([table[:, BLOCKS[i][k]].sum() / expected[i][k] for i in who])
            rewards[k] = 0.7 * rewards[k] + 0.3 * worth
    assert policy.evaluations == 12 * 3


@pytest.mark.oracle("policies", "fixed")
def test_fixed_weights_stay():
    policy = Fixed(BLOCKS, weights=(3.0, 1.0, 4.0), favourite=1, share=0.4)
    expected = [0.6, 0.4, 1.0, 0.6 * 3 / 7, 0.4, 0.6 * 4 / 7]
    np.testing.assert_allclose(policy.probabilities(), expected, atol=1e-15)
    policy.update(FacilityLocation(np.eye(6)))
    np.testing.assert_allclose(policy.probabilities(), expected, atol=1e-15)
    both = Fixed([2, 2], favourite=(-1, 0), seed=[0, 1])
    assert both.probabilities().tolist() == [[0.5] * 4, [0.4, 0.6] * 2]
    np.testing.assert_allclose(Fixed([[0], [1]], favourite=0, share=0.0).probabilities(), [1, 1])
    actions = Fixed([3], favourite=2, seed=list(range(20_000))).act().numpy()
    assert np.abs(np.bincount(actions[:, 0]) / 20_000 - [0.3, 0.3, 0.4]).max() < 4 * np.sqrt(0.4 * 0.6 / 20_000)


def test_a_weight_that_became_tiny_comes_back():
    policy = Hedge([2], eta=1000.0, gamma=0.0)
    for table in ([[1.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.25]]):
        policy.update(FacilityLocation(table))
    assert float(policy.probabilities()[1]) > 0.999


@pytest.mark.parametrize(("policy", "knobs"), [("odm", {}), ("hedge", {"eta": 0.5}), ("fixed", {"favourite": 1})])
def test_a_scheduler_draws_by_losses_and_goes_on_from_its_state(policy, knobs):
    def made():
        return DomainScheduler(torch.eye(3), workers=2, policy=policy, utility="loss", knobs=knobs, seed=3)

    def play(scheduler, rounds):
        chosen = []
        for number in rounds:
            chosen.append(scheduler.next_domains())
            scheduler.observe([1.0 + number % 3, 2.0, 9.0])
        return chosen

    whole, first, fresh = made(), made(), made()
    every = play(whole, range(40))
    play(first, range(20))
    fresh.load_state_dict({name: part.clone() for name, part in first.state_dict().items()})
    assert play(fresh, range(20, 40)) == every[20:]
    favoured = whole.shares().mean(0).argmax()
    assert int(favoured) == (1 if policy == "fixed" else 2)  # the domain of the highest loss


def test_the_utility_of_losses_counts_each_domain_once_and_as_it_is():
    scheduler = DomainScheduler(
        torch.eye(3),
        workers=2,
        policy="oracle_greedy",
        utility="loss",
        floor=0.0,
        needs=Needs(3, reference=[1, 1, 1], memory=0),
    )
    scheduler.next_domains()
    scheduler.observe([1.5, 4.0, 3.0])
    f = scheduler.objective()
    values = {(a, b): float(f.value(torch.eye(6)[a] + torch.eye(6)[3 + b])) for a in range(3) for b in range(3)}
    assert values[1, 1] == 3.0 and values[1, 2] == 5.0 and values[0, 2] == 2.5
    assert sorted(scheduler.next_domains()) == [1, 2]
    world = SelectionWorld(torch.eye(3), workers=2, utility="loss", seed=[0, 1])
    torch.testing.assert_close(world.objective().first_gains(), world.need.repeat(1, 2))


def test_the_best_fixed_weights_are_tried_on_their_own_grid():
    table = [[0.1, 0.1, 0.9], [0.1, 0.1, 0.9]]
    found = tune(
        Variant("fixed", {"share": 1.0}), lambda seeds: SelectionWorld(table, workers=2, seed=seeds), [[1.0]],
        seeds=[5, 6], rounds=4, steps=[100.0],
    )  # fmt: skip
    assert list(found) == ["-1", "0", "1", "2"] and best_step(found) == 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ODM([2], memory=1.0), "memory is 1.0"),
        (lambda: ODM([2]).update(FacilityLocation([[1.0, 1.0]])), "call act before update"),
        (lambda: Fixed([2], weights=(1.0,)), "weights are [1.0], expected 2 finite numbers"),
        (lambda: Fixed([2], weights=(1.0, float("nan"))), "each item a finite number"),
        (lambda: Fixed([2, 1], weights=(0.0, 1.0)), "an agent has no action of a weight above 0"),
        (lambda: Fixed([2], favourite=2), "favourite is 2, expected -1 for none, or a position from 0 to 1"),
        (lambda: Fixed([2], favourite=(0, 1)), "favourite has 2 positions, which needs as many seeds"),
        (lambda: Fixed([2], share=2.0), "share is 2.0"),
        (lambda: DomainScheduler([[1.0, 0.0]], workers=1, utility="loss"), "1 probes and 2 domains"),
        (lambda: DomainScheduler([[1.0], [1.0, 0.0]], workers=1), "rows of one length"),
        (lambda: SelectionWorld([[1.0, 2.0]], workers=1), "in [0, 1]"),
        (lambda: SelectionWorld(torch.eye(2), workers=0), "workers is 0"),
        (lambda: SelectionWorld(torch.eye(2), workers=1, learn=3.0), "learn is 3.0"),
        (lambda: DomainScheduler(torch.eye(2), workers=1).load_state_dict({}), "current, excess, round is missing"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        call()
