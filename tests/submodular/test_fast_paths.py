"""What is made faster gives the numbers of the plain way: own gains, draws of others, averages over few links."""

from __future__ import annotations

import pytest
import torch

from modicum.submodular import MAOSMA, FacilityLocation, Simulated, erdos_renyi, metropolis_weights, ring
from modicum.submodular.draws import keys, rounds_of_uniform, uniform
from modicum.submodular.functions.facility import _members
from modicum.submodular.partition import Partition
from modicum.submodular.relaxation import draw_members

RNG = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order():
    RNG.manual_seed(0)


def rand(*shape, dtype=torch.float64):
    return torch.rand(*shape, generator=RNG, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("worlds", [(), (3,), (40,)])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_own_gains_are_the_gains_of_own_actions(worlds, weighted, dtype):
    partition = Partition.of([6] * 20)
    V = (4 * rand(*worlds, 30, 120)).round().to(dtype)  # with many ties
    f = FacilityLocation(V, weights=rand(*worlds, 30, dtype=dtype) if weighted else None)
    for density in (0.0, 0.1, 0.3):
        sets = rand(*worlds, 20, 120) < density
        expected = f.gains(sets, partition.index)
        torch.testing.assert_close(f.own_gains(sets, partition), expected)
        assert density == 0 or bool((sets & (partition.owner == partition.number)).any())
        others = sets & (partition.owner != partition.number)
        members = _members(others.reshape(-1, 120)).reshape(*worlds, 20, -1)
        found = f.own_gains(members, partition, disjoint=True)
        torch.testing.assert_close(found, f.gains(others, partition.index))


def test_worlds_may_share_an_objective_and_blocks_may_stand_anywhere():
    f = FacilityLocation(rand(5, 6))
    for blocks in ([2, 2, 2], [[0, 3], [1], [5, 2, 4]]):
        partition = Partition.of(blocks)
        sets = rand(4, 3, 6) < 0.5
        torch.testing.assert_close(f.own_gains(sets, partition), f.gains(sets, partition.index))


@pytest.mark.parametrize("blocks", [[2, 2, 2], [[0, 3], [1], [5, 2, 4]], [24] * 40])
def test_the_drawn_others_are_those_of_a_slow_draw(blocks):
    partition = Partition.of(blocks)
    agents, n = partition.agents, partition.n
    x = rand(7, agents, n) * (rand(7, agents, n) < 0.6)
    x /= 2 * x.sum(-1, keepdim=True).clamp(min=1)
    z, u = rand(7, agents, 1), rand(7, agents, agents) / 4
    found = draw_members(x, partition, z, u)
    for world, i, other in torch.cartesian_prod(torch.tensor([0, 6]), *[torch.arange(min(agents, 5))] * 2).tolist():
        expected, total = n, 0.0
        for element in partition.blocks[other] if other != i else ():
            total += float(z[world, i] * x[world, i, element])
            if total > float(u[world, i, other]):
                expected = element
                break
        assert int(found[world, i, other]) == expected
    alone = draw_members(x[:, [1]], partition, z[:, [1]], u[:, [1]], torch.tensor([1]))
    assert torch.equal(alone, found[:, [1]])


def test_an_average_over_few_links_is_the_product_with_all_weights():
    W = metropolis_weights(erdos_renyi(60, degree=3, seed=1))
    partition, x = Partition.of([2] * 60), rand(2, 60, 120)
    network = Simulated(W)
    torch.testing.assert_close(network.average(x, partition, 0), W @ x, rtol=0, atol=1e-15)
    assert network.bytes == 2 * int((W > 0).sum() - 60) * 120 * 8
    dense = Simulated(metropolis_weights(ring(5)))
    torch.testing.assert_close(dense.average(x[:, :5], partition, 0), dense.W @ x[:, :5])
    thinned = Simulated(W, drop=0.5, seed=3)
    torch.testing.assert_close(thinned.average(x, partition, 4), thinned.weights(4) @ x, rtol=0, atol=1e-15)


def test_numbers_of_rounds_to_come_are_those_of_each_round():
    key = keys([0, 1], "act", [0, 1, 2])
    made = rounds_of_uniform(key, 7, 4, 5)
    assert made.shape == (4, 2, 3, 5)
    for turn in range(4):
        assert torch.equal(made[turn], uniform(key, 7 + turn, 5))
    policy = MAOSMA([2, 2], [[0.5, 0.5]] * 2, eta=1.0)
    for turn in (0, 5, 3, 4000, 4):
        assert torch.equal(policy._uniform("act", turn, 3), uniform(keys([0], "act", [0, 1])[0], turn, 3))
