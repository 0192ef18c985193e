"""Functions, extensions and policies against NumPy by enumeration."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from modicum.submodular import (
    BSG,
    MAOSEA,
    MAOSMA,
    MASPL,
    OSG,
    RAG,
    BestResponse,
    ConcaveOverModular,
    FacilityLocation,
    Hedge,
    LastGreedy,
    Mixture,
    NoCommunication,
    OracleGreedy,
    ProbabilisticCoverage,
    Random,
    WeightedCover,
    erdos_renyi,
    from_callable,
    greedy,
    metropolis_weights,
    path,
    policy_surrogate_grad_exact,
    sequential_greedy,
    surrogate_grad_exact,
)
from modicum.submodular.functions import SetFunction
from oracles import submodular as oracle

RNG = np.random.default_rng(0)
BLOCKS = [[0, 3], [1], [5, 2, 4]]  # uneven and out of order
N = 6


def tables(kind, rows=4, n=N, seed=0):
    rng = np.random.default_rng(seed)
    table, weights = rng.random((rows, n)).round(2), rng.random(rows)
    table[0, 0] = 1
    table[1] = 0
    if kind == "facility":
        return FacilityLocation(table, weights=weights), oracle.facility(table, weights)
    if kind == "coverage":
        return ProbabilisticCoverage(table, weights=weights), oracle.coverage(table, weights)
    if kind == "cover":
        return WeightedCover(table > 0.5, weights=weights), oracle.coverage(table > 0.5, weights)
    if kind == "mixture":
        (f, g), (p, q) = tables("facility", seed=1), tables("coverage", seed=2)
        return Mixture([f, p], [0.5, 2]), lambda s: 0.5 * g(s) + 2 * q(s)
    if kind == "callable":
        g = oracle.facility(table, weights)
        return from_callable(lambda mask: g(mask.nonzero().flatten().tolist()), n), g
    phi = kind.removeprefix("concave-")
    tau = 0.8 if phi == "min" else None
    return ConcaveOverModular(table, weights=weights, phi=phi, tau=tau), oracle.concave(table, weights, phi, tau)


EXACT = ("facility", "coverage", "cover", "mixture")
KINDS = (*EXACT, "concave-sqrt", "concave-log1p", "concave-min", "callable")


def all_masks(n=N):
    return torch.tensor([[bool(number >> a & 1) for a in range(n)] for number in range(2**n)])


@pytest.mark.parametrize("kind", KINDS)
def test_values_gains_and_curvature_of_every_set(kind):
    f, g = tables(kind)
    masks = all_masks()
    sets = [mask.nonzero().flatten().tolist() for mask in masks]
    np.testing.assert_allclose(f.value(masks), [g(s) for s in sets], atol=1e-12)
    block = [4, 0, 2]
    np.testing.assert_allclose(f.gains(masks, block), [[oracle.gain(g, s, a) for a in block] for s in sets], atol=1e-12)
    blocks = torch.from_numpy(RNG.integers(0, N, (len(masks), 2)))
    expected = [[oracle.gain(g, s, a) for a in row] for s, row in zip(sets, blocks.tolist())]
    np.testing.assert_allclose(f.gains(masks, blocks), expected, atol=1e-12)
    assert f.curvature() == pytest.approx(oracle.curvature(g, N), abs=1e-12)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("edge", [False, True])
def test_extensions_against_enumeration(kind, edge):
    f, g = tables(kind)
    x = np.random.default_rng(5).random((3, N))
    if edge:
        x[0, :2], x[1], x[2] = (0, 1), 1, 0
    np.testing.assert_allclose(f.multilinear(x), [oracle.multilinear(g, row) for row in x], atol=1e-12)
    np.testing.assert_allclose(f.multilinear_grad(x), [oracle.multilinear_grad(g, row) for row in x], atol=1e-12)
    for c in (0, 0.4, 1):
        expected = [oracle.surrogate_grad(g, row, c) for row in x]
        np.testing.assert_allclose(surrogate_grad_exact(f, x, c=c), expected, atol=1e-11)


@pytest.mark.parametrize("kind", EXACT)
def test_the_policy_extension_against_enumeration(kind):
    f, g = tables(kind)
    x = np.random.default_rng(7).random(N) / 3
    found = policy_surrogate_grad_exact(f, x, BLOCKS)
    for agent, block in enumerate(BLOCKS):
        np.testing.assert_allclose(found[block], oracle.spl_grad(g, x, BLOCKS, agent), atol=1e-12)


@pytest.mark.parametrize("agents", [5, 20, 64])
@pytest.mark.parametrize("table", [FacilityLocation, ProbabilisticCoverage])
def test_the_default_nodes_are_enough(agents, table):
    f = table(np.random.default_rng(1).random((6, agents * 8)) ** 3)
    x = torch.full((agents * 8,), 1 / 8, dtype=torch.float64)
    found, finer = surrogate_grad_exact(f, x), surrogate_grad_exact(f, x, nodes=2 * (8 + agents // 4 + 1))
    assert float((found - finer).abs().max() / finer.abs().max()) < 1e-10


def test_shared_columns_equal_columns_of_their_own():
    D, columns = RNG.random((5, 3)), [0, 1, 2, 0, 1, 2, 2]
    short, long = FacilityLocation(D, columns=columns), FacilityLocation(D[:, columns])
    x = RNG.random((4, 7))
    x[0, 0] = 1
    np.testing.assert_allclose(short.multilinear(x), long.multilinear(x), atol=1e-13)
    np.testing.assert_allclose(short.multilinear_grad(x), long.multilinear_grad(x), atol=1e-13)
    masks = all_masks(7)
    np.testing.assert_allclose(short.value(masks), long.value(masks))
    np.testing.assert_allclose(short.gains(masks, [0, 3, 6]), long.gains(masks, [0, 3, 6]))
    np.testing.assert_allclose(short.last_gains(), long.last_gains())


def test_features_make_the_same_function():
    X, Y = RNG.normal(size=(9, 4)), RNG.normal(size=(5, 4))
    for kernel, dense in (
        ("dot", Y @ X.T),
        ("rbf", np.exp(-((Y[:, None] - X) ** 2).sum(-1) / 4)),
        ("cosine", (Y / np.linalg.norm(Y, axis=1)[:, None]) @ (X / np.linalg.norm(X, axis=1)[:, None]).T),
    ):
        g = oracle.facility(np.maximum(dense, 0))
        full = FacilityLocation.from_features(X, Y, kernel=kernel)
        sparse = FacilityLocation.from_features(X, Y, kernel=kernel, neighbours=9)
        masks = all_masks(9)[::7]
        sets = [mask.nonzero().flatten().tolist() for mask in masks]
        for f in (full, sparse):
            np.testing.assert_allclose(f.value(masks), [g(s) for s in sets], atol=1e-12)
            np.testing.assert_allclose(f.last_gains(), [oracle.gain(g, range(9), a) for a in range(9)], atol=1e-12)
            assert list(greedy(f, 4)) == oracle.greedy(g, 9, 4)
        x = RNG.random(9)
        np.testing.assert_allclose(sparse.multilinear_grad(x), oracle.multilinear_grad(g, x), atol=1e-12)
    few = FacilityLocation.from_features(X, Y, kernel="rbf", neighbours=2)
    V = np.exp(-((Y[:, None] - X) ** 2).sum(-1) / 4)
    kept = np.where(np.sort(V, 1)[:, [-2]] <= V, V, 0)
    np.testing.assert_allclose(few.value(all_masks(9)), FacilityLocation(kept).value(all_masks(9)), atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_against_all_gains(kind):
    f, g = tables(kind)
    assert list(greedy(f, 4)) == oracle.greedy(g, N, 4)
    order = [2, 0, 1]
    positions = oracle.sequential(g, BLOCKS, order)
    assert list(sequential_greedy(f, BLOCKS, order=order)) == [BLOCKS[i][positions[i]] for i in order]


GOSSIP = {
    "ma_osma": (MAOSMA, {"c": 0.6}),
    "ma_osma, plain": (MAOSMA, {"surrogate": False}),
    "ma_osma, owner": (MAOSMA, {"consensus": "owner", "grad_at": "y"}),
    "ma_osea": (MAOSEA, {"gamma": 0.07}),
    "ma_osea, global": (MAOSEA, {"gamma": 0.07, "mix": "global", "consensus": "owner"}),
    "ma_spl": (MASPL, {}),
    "ma_spl, owner": (MASPL, {"consensus": "owner"}),
}


@pytest.mark.oracle("policies", GOSSIP)
@pytest.mark.parametrize("name", GOSSIP)
@pytest.mark.parametrize("init", ["own", "all"])
@pytest.mark.parametrize("kind", ["facility", "coverage"])
def test_gossiping_policies_round_by_round(name, init, kind):
    f, g = tables(kind)
    made, knobs = GOSSIP[name]
    W = oracle.metropolis(path(3))
    np.testing.assert_allclose(metropolis_weights(path(3)), W, atol=1e-15)
    policy = made(BLOCKS, W, eta=0.2, gradient="exact", init=init, **knobs)
    x = oracle.start(BLOCKS, init)
    for _ in range(3):
        np.testing.assert_allclose(policy.x, x, atol=1e-11)
        x = oracle.gossip(g, x, BLOCKS, W, eta=0.2, kind=name.partition(",")[0], **knobs)
        policy.update(f)


@pytest.mark.oracle("policies", "no_communication")
def test_without_communication_everybody_is_alone():
    f, g = tables("facility")
    policy, x = NoCommunication(BLOCKS, eta=0.2, gradient="exact"), oracle.start(BLOCKS, "own")
    for _ in range(3):
        x = oracle.gossip(g, x, BLOCKS, np.eye(3), eta=0.2)
        policy.update(f)
    np.testing.assert_allclose(policy.x, x, atol=1e-11)


@pytest.mark.oracle("policies", "osg", "bsg")
@pytest.mark.parametrize(("made", "twin"), [(OSG, oracle.OSG), (BSG, oracle.BSG)])
def test_ordered_policies_round_by_round(made, twin):
    order = [1, 2, 0]
    policy, other = made(BLOCKS, horizon=12, scale=2.0, order=order), twin(BLOCKS, 12, 2.0, order)
    for turn in range(6):
        f, g = tables("facility", seed=turn)
        np.testing.assert_allclose(policy.probabilities(), other.probabilities(), atol=1e-12)
        actions = policy.act()
        policy.update(f)
        other.update(g, actions.tolist())


@pytest.mark.oracle("policies", "oracle_greedy", "last_greedy")
def test_greedy_policies():
    now, last = OracleGreedy(BLOCKS), LastGreedy(BLOCKS, order=[2, 1, 0])
    for seed in range(4):
        f, g = tables("facility", seed=seed)
        assert now.act(f).tolist() == oracle.sequential(g, BLOCKS)
        now.update(f)
        last.update(f)
        assert last.act().tolist() == oracle.sequential(g, BLOCKS, [2, 1, 0])
        hint, known = tables("facility", seed=seed + 9)
        assert last.act(hint).tolist() == oracle.sequential(known, BLOCKS, [2, 1, 0])


@pytest.mark.oracle("policies", "rag")
def test_rag_decides_among_neighbours():
    W = metropolis_weights(erdos_renyi(7, degree=2, seed=1))
    blocks = [[2 * i, 2 * i + 1] for i in range(7)]
    for seed in range(5):
        f, g = tables("facility", n=14, seed=seed)
        policy = RAG(blocks, W)
        policy.update(f)
        assert policy.act().tolist() == oracle.rag(g, blocks, W.tolist())


@pytest.mark.oracle("policies", "best_response")
def test_best_responses():
    policy, done = BestResponse(BLOCKS, laziness=0.0), [-1, -1, -1]
    for seed in range(5):
        f, g = tables("facility", seed=seed)
        done = policy.act().tolist()
        policy.update(f)
        assert policy.act().tolist() == oracle.responses(g, BLOCKS, done)


@pytest.mark.oracle("policies", "hedge")
def test_hedge_weighs_actions_by_their_own_values():
    policy, weights = Hedge(BLOCKS, eta=0.7, gamma=0.1), [np.ones(len(block)) for block in BLOCKS]
    for seed in range(4):
        f, g = tables("facility", seed=seed)
        policy.update(f)
        weights = [w * np.exp(0.7 * np.array([g({a}) for a in block])) for w, block in zip(weights, BLOCKS)]
        expected = [0.9 * w / w.sum() + 0.1 / len(w) for w in weights]
        np.testing.assert_allclose(policy.probabilities(), np.concatenate(expected), atol=1e-12)


@pytest.mark.oracle("policies", "random")
def test_random_actions_are_uniform():
    actions = Random([3, 2], seed=list(range(30_000))).act().numpy()
    for agent, size in enumerate((3, 2)):
        share = np.bincount(actions[:, agent], minlength=size) / len(actions)
        assert np.abs(share - 1 / size).max() < 4 * np.sqrt(1 / size / len(actions))


def test_what_a_function_lacks_is_said():
    with pytest.raises(NotImplementedError):
        SetFunction().value([True])
