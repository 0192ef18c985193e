"""Networks that change, lose messages or bring them late."""

from __future__ import annotations

import pytest
import torch
from gadgets import gadgets

from modicum.errors import ModicumError
from modicum.submodular import MAOSMA, MASPL, Simulated, complete, metropolis_weights, path, ring
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
        old = sent[turn - 2] if turn >= 2 else x
        torch.testing.assert_close(network.average(x, PARTITION, turn), off @ old + W.diagonal()[:, None] * x)


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


def test_hints_are_no_part_of_what_is_under_way():
    network, x = Simulated(W, delay=1), copies()
    network.average(x, PARTITION, 0, scratch=True)
    assert not network.state_dict()


def test_half_precision_keeps_an_agents_own_digits():
    network, x = Simulated(W, foreign="float16"), copies()
    y = network.average(x, PARTITION, 0)
    own = W.diagonal()[:, None] * x
    exact = W @ x
    assert float((y - exact).abs().max()) < 1e-3 and not torch.equal(y, exact)
    torch.testing.assert_close(y[1, :2], own[1, :2] + W[1, 0] * x[0, :2] + W[1, 2] * x[2, :2].half().double())
    assert network.bytes == 12 * (2 * 8 + 10 * 2)
