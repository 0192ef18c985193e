"""Networks that change, lose messages or bring them late."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gadgets import gadgets

from modicum.errors import ModicumError
from modicum.submodular import (
    MAOSMA,
    MASPL,
    RAG,
    FacilityLocation,
    Simulated,
    complete,
    metropolis_weights,
    path,
    ring,
    simulate,
)
from modicum.submodular.graphs import check_weights
from modicum.submodular.partition import Partition

BLOCKS = [2] * 6
W = metropolis_weights(ring(6))
PARTITION = Partition.of(BLOCKS)


def copies(seed=0):
    return torch.rand(6, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_network_that_loses_everything_is_none():
    x = copies()
    assert torch.equal(Simulated(W, drop=1.0).average(x, PARTITION, 0), x)
    torch.testing.assert_close(Simulated(W, drop=0.0).average(x, PARTITION, 0), W @ x)


def test_lost_messages_leave_rows_that_sum_to_one():
    network = Simulated(W, drop=0.5, seed=3)
    rows = [network.weights(turn) for turn in range(200)]
    for weights in rows:
        torch.testing.assert_close(weights.sum(1), torch.ones(6, dtype=torch.float64))
        assert not weights[W == 0].any()
    share = torch.stack([weights[0, 1] > 0 for weights in rows]).double().mean()
    assert 0.35 < float(share) < 0.65 and torch.equal(network.weights(7), Simulated(W, drop=0.5, seed=3).weights(7))


def test_late_messages_are_those_of_earlier_rounds():
    network, sent = Simulated(W, delay=2), [copies(seed) for seed in range(5)]
    off = W - torch.diag(W.diagonal())
    for turn, x in enumerate(sent):
        # Nothing has arrived before round 2: each agent has its own copy alone.
        expected = off @ sent[turn - 2] + W.diagonal()[:, None] * x if turn >= 2 else x
        torch.testing.assert_close(network.average(x, PARTITION, turn), expected)


def test_messages_of_a_hint_come_late_too_and_are_forgotten():
    network, x, tried = Simulated(W, delay=2), copies(), [copies(seed) for seed in range(1, 5)]
    off = W - torch.diag(W.diagonal())

    def late(old, now):
        return off @ old + W.diagonal()[:, None] * now

    network.average(x, PARTITION, 0)
    kept = network.state_dict()
    for _ in range(2):  # a second hint goes as the first
        found = [network.average(one, PARTITION, 1, trial=number) for number, one in enumerate(tried)]
        assert torch.equal(found[0], tried[0])
        torch.testing.assert_close(found[1], late(x, tried[1]))
        torch.testing.assert_close(found[3], late(tried[1], tried[3]))
    assert torch.equal(network.state_dict()["sent"], kept["sent"])


def test_a_hint_is_played_on_the_graph_of_its_round():
    asked, f = [], gadgets(3)

    def graph(turn):
        asked.append(turn)
        return W

    policy = MASPL(BLOCKS, graph, eta=0.3)
    asked.clear()
    simulate(policy, f, rounds=3, hints=f, hint_rounds=2)
    assert asked == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    lossy = Simulated(W, drop=0.5, seed=3)
    drawn = [lossy.weights(0), *(lossy.weights(turn, trial=trial) for turn in (0, 1) for trial in (0, 1))]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_rag_listens_to_the_network():
    graphs, objectives = [W, metropolis_weights(complete(6))], [gadgets(3) for _ in range(4)]
    asked = []

    def graph(turn):
        asked.append(turn)
        return graphs[turn % 2]

    policy = RAG(BLOCKS, graph)
    asked.clear()
    simulate(policy, objectives)
    assert asked == [0, 1, 2, 3]
    # Two agents with one best action each, the same: who hears nothing takes it as well.
    f = FacilityLocation([[1.0, 0.0, 1.0, 0.0], [0.0, 0.5, 0.0, 0.5]])
    half = torch.full((2, 2), 0.5)
    for drop, actions in ((0.0, [0, 1]), (1.0, [0, 0])):
        policy = RAG([2, 2], Simulated(half, drop=drop))
        policy.update(f)
        assert policy.act().tolist() == actions and policy.communication.bytes > 0
    with pytest.raises(ModicumError, match="delay is 1, but RAG's agents wait for answers"):
        RAG([2, 2], Simulated(half, delay=1))


def test_a_policy_goes_on_with_the_messages_that_are_under_way():
    def made():
        return MASPL(BLOCKS, Simulated(W, delay=2, drop=0.2), eta=0.3)

    f, whole, first = gadgets(3), made(), made()
    for _ in range(8):
        whole.update(f)
    for _ in range(4):
        first.update(f)
    fresh = made()
    fresh.load_state_dict({name: part.clone() for name, part in first.state_dict().items()})
    for _ in range(4):
        fresh.update(f)
    assert torch.equal(fresh.x, whole.x)


def test_a_graph_may_change_every_round():
    graphs = [metropolis_weights(made(6)) for made in (ring, path, complete)]
    network, x = Simulated(lambda turn: graphs[turn % 3]), copies()
    for turn in range(4):
        before = network.bytes
        torch.testing.assert_close(network.average(x, PARTITION, turn), graphs[turn % 3] @ x)
        assert network.bytes - before == 8 * 12 * int((graphs[turn % 3] > 0).sum() - 6)
    policy = MAOSMA(BLOCKS, lambda turn: graphs[turn % 3], eta=0.1)
    policy.update(gadgets(3))
    with pytest.raises(ModicumError, match="not doubly stochastic"):
        Simulated(lambda turn: W if turn == 0 else 2 * W).average(x, PARTITION, 1)


def test_a_changing_graph_may_fall_apart_in_a_round():
    pairs = [[[0, 1], [2, 3]], [[1, 2], [3, 0]]]

    def matched(turn):
        graph = torch.eye(4, dtype=torch.float64)
        for i, j in pairs[turn % 2]:
            graph[i, i] = graph[i, j] = graph[j, i] = graph[j, j] = 0.5
        return graph

    x, network, partition = torch.eye(4, dtype=torch.float64), Simulated(matched), Partition.of([1] * 4)
    for turn in range(2):
        x = network.average(x, partition, turn)
    torch.testing.assert_close(x, torch.full((4, 4), 0.25, dtype=torch.float64))


def test_weights_of_few_digits_sum_to_one():
    for weights in (torch.full((3, 3), 1 / 3), metropolis_weights(ring(50)).float(), W.numpy().astype(np.float16)):
        found = check_weights(weights)
        torch.testing.assert_close(found.sum(1), torch.ones(len(found), dtype=torch.float64), rtol=0, atol=1e-15)
        assert torch.equal(found, found.T)


def test_half_precision_keeps_an_agents_own_digits():
    network, x = Simulated(W, foreign="float16"), copies()
    y = network.average(x, PARTITION, 0)
    own = W.diagonal()[:, None] * x
    exact = W @ x
    assert float((y - exact).abs().max()) < 1e-3 and not torch.equal(y, exact)
    torch.testing.assert_close(y[1, :2], own[1, :2] + W[1, 0] * x[0, :2] + W[1, 2] * x[2, :2].half().double())
    assert network.bytes == 12 * (2 * 8 + 10 * 2)
