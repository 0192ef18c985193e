"""Every draw has a name of its own: seed, step, query, tensor, purpose and place, and nothing else."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zeroth_order_models import METHODS

from modicum.optim import LOZO, MeZO, SubZero, TeZO
from modicum.optim.zeroth_order import leaves, perturb
from modicum.optim.zeroth_order.leaves import Leaf
from modicum.optim.zeroth_order.lifts import Core, Diagonal, Left
from modicum.optim.zeroth_order.rounding import place_noise, stochastic_round

every_method = pytest.mark.parametrize("name", METHODS)


def twins(dtype=torch.float64):
    """Two equal matrices, a third that is square, and two equal vectors."""
    rng = torch.Generator().manual_seed(0)
    matrix, vector = torch.randn(6, 5, generator=rng, dtype=dtype), torch.randn(7, generator=rng, dtype=dtype)
    values = {"a": matrix, "b": matrix, "square": torch.eye(5, dtype=dtype), "v": vector, "w": vector}
    return {name: nn.Parameter(value.clone()) for name, value in values.items()}


def made(name, weights, **knobs):
    method, more = METHODS[name]
    return method(weights.items(), **{"lr": 1e-2, **more, **knobs})


def probes(name, steps=1, dtype=torch.float64, **knobs):
    """How far each tensor stands from its start of the step at each point of the last step."""
    weights = twins(dtype)
    optimizer, seen = made(name, weights, **knobs), []

    def closure():
        seen.append({name: p.detach().clone() for name, p in weights.items()})
        return sum((p.detach() - i).square().sum() for i, p in enumerate(weights.values()))

    for _ in range(steps):
        seen.clear()
        before = {name: p.detach().clone() for name, p in weights.items()}
        optimizer.step(closure)
    return [{name: point[name] - before[name] for name in before} for point in seen]


def same(one, two):
    return abs(torch.cosine_similarity(one.flatten(), two.flatten(), dim=0).item()) > 0.99


@every_method
def test_two_tensors_of_one_shape_get_different_directions(name):
    point = probes(name)[-1]
    assert point["a"].norm() > 0 and point["v"].norm() > 0
    assert not same(point["a"], point["b"]) and not same(point["v"], point["w"])


@pytest.mark.parametrize("name", [name for name in METHODS if name != "sparse-mezo"])  # whose masks move too
def test_steps_and_seeds_get_different_directions(name):
    first, second, other = probes(name)[-1], probes(name, steps=2)[-1], probes(name, seed=1)[-1]
    for tensor in first:
        assert not same(first[tensor], second[tensor]) and not same(first[tensor], other[tensor])


@pytest.mark.parametrize("name", ["n-spsa", "fzoo", "subzero-plus"])
def test_queries_of_a_step_get_different_directions(name):
    points = [point for point in probes(name) if point["a"].norm() > 0]
    pairs = [(one, two) for i, one in enumerate(points) for two in points[:i]]
    opposite = [not same(one["a"], two["a"]) or torch.equal(one["a"].sign(), -two["a"].sign()) for one, two in pairs]
    assert len(points) >= 3 and all(opposite)
    assert sum(not same(one["a"], two["a"]) for one, two in pairs) >= 3


def test_dense_noise_has_mean_zero_and_variance_one():
    leaf = MeZO([("w", nn.Parameter(torch.zeros(1000, 100)))], lr=1e-3).leaves[0]
    for how in ("normal", "rademacher"):
        (chunk,) = leaf.chunks
        drawn = leaf.draw(chunk, seed=0, step=0, query=0, how=how)
        assert abs(drawn.mean().item()) < 0.02 and abs(drawn.square().mean().item() - 1) < 0.02


def test_each_part_of_a_draw_s_name_counts():
    names = {"seed": 0, "step": 0, "query": 0, "purpose": "dense"}
    one, two = (Leaf(name, torch.zeros(9, 3), {}) for name in "ab")
    (chunk,) = one.chunks
    drawn = [leaf.draw(chunk, **names) for leaf in (one, two)]
    drawn += [one.draw(chunk, **names | changed) for changed in ({"seed": 1}, {"step": 1}, {"query": 1})]
    drawn.append(one.draw(chunk, **names | {"purpose": "around"}))
    assert torch.equal(drawn[0], one.draw(chunk, **names))
    assert not any(torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize("lift", [Diagonal(), Left(), Core()])
def test_each_part_of_a_factor_s_name_counts(lift):
    names = {"rank": 2, "seed": 0, "name": "a", "epoch": 0}
    changes = ({}, {"seed": 1}, {"name": "b"}, {"epoch": 1})
    factors = [factor for change in changes for factor in lift.basis((5, 5), **names | change)]
    assert not any(same(a, b) for i, a in enumerate(factors) for b in factors[:i])
    assert all(map(torch.equal, lift.basis((5, 5), **names), factors))


@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 4), st.data())
def test_a_dense_direction_does_not_depend_on_shards(rows, columns, per, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leaves, "CHUNK", per * columns)
        whole = shard(torch.zeros(rows, columns), 0, rows)
        expected = torch.cat([whole.draw(chunk, seed=0, step=0, query=0) for chunk in whole.chunks])
        start = data.draw(st.integers(0, rows - 1))
        stop = data.draw(st.integers(start + 1, rows))
        part = shard(torch.zeros(rows, columns), start, stop)
        drawn = [part.draw(chunk, seed=0, step=0, query=0) for chunk in part.chunks]
        assert torch.equal(torch.cat(drawn), expected[start:stop])
        assert [(c.rows.start, c.rows.stop) for c in part.chunks][-1][1] == stop - start


def shard(tensor, start, stop, name="w"):
    """A leaf of which this process holds the rows from ``start`` to ``stop``."""
    leaf = Leaf(name, tensor, {})
    leaf.rows, leaf.local = lambda: slice(start, stop), lambda: tensor[start:stop]
    return leaf


@pytest.mark.parametrize("lift", [Diagonal(), Left(), Core()])
@given(st.sampled_from([(7, 4), (7, 3, 4)]), st.integers(0, 6), st.integers(1, 7))
def test_a_low_rank_direction_does_not_depend_on_shards(lift, shape, start, rows):
    def lifted(leaf):
        leaf.rank, leaf.coordinates = 2, slice(0, lift.size(shape, rank=2))
        leaf.prepare(lift, seed=0, epoch=0)
        left, right = leaf.factors(lift, torch.arange(100, dtype=torch.float64))
        return left @ right.mT

    tensor, stop = torch.zeros(shape, dtype=torch.float64), min(7, start + rows)
    assert torch.equal(lifted(shard(tensor, start, stop)), lifted(shard(tensor, 0, 7))[start:stop])


shapes = st.sampled_from([(7,), (7, 1), (7, 5), (7, 2, 3), (7, 2, 3, 2)])


@given(shapes, st.lists(st.integers(1, 6), max_size=3, unique=True), st.integers(1, 7), st.integers(0, 3))
def test_rounding_noise_does_not_depend_on_shards_or_blocks(shape, cuts, per, step):
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    optimizer = MeZO([("w", nn.Parameter(tensor))], lr=1e-3)
    optimizer.steps = step
    expected = optimizer._noise(optimizer.leaves[0], slice(0, 7))
    assert expected.unique().numel() == tensor.numel()
    edges = [0, *sorted(cuts), 7]
    for start, stop in pairwise(edges):
        part = shard(tensor, start, stop)
        blocks = [optimizer._noise(part, slice(i, i + per)) for i in range(0, stop - start, per)]
        assert torch.equal(torch.cat(blocks), expected[start:stop])


ROUNDED = {
    "mezo": (MeZO, {}),
    "tezo": (TeZO, {"rank": 2}),
    "tezo-adam": (TeZO, {"rank": 2, "variant": "adam"}),
    "lozo": (LOZO, {"rank": 2}),
    "subzero": (SubZero, {"rank": 2}),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_method
def test_rounding_noise_is_fresh_for_every_step_tensor_and_block(name, dtype, monkeypatch):
    kept, rounded = [], perturb.stochastic_round
    monkeypatch.setattr(perturb, "BLOCK", 10)
    monkeypatch.setattr(perturb, "stochastic_round", lambda *x, noise: kept.append(noise) or rounded(*x, noise=noise))
    probes(name, steps=3, dtype=dtype)
    words = torch.cat([noise.flatten() for noise in kept])
    # All bits of all entries of all steps: a word that came back by chance would be one in a million.
    assert words.numel() >= 3 * (2 * 30 + 25 + 2 * 7) and words.unique().numel() == words.numel()


@pytest.mark.parametrize("name", ROUNDED)
def test_short_weights_do_not_depend_on_blocks(name, monkeypatch):
    def run(block):
        monkeypatch.setattr(perturb, "BLOCK", block)
        weights = twins(torch.bfloat16)
        method, knobs = ROUNDED[name]
        optimizer = method(weights.items(), lr=1e-2, **knobs)
        for _ in range(4):
            optimizer.step(lambda: sum(p.detach().float().square().sum() for p in weights.values()))
        return torch.cat([p.detach().flatten() for p in weights.values()])

    whole = run(1 << 18)
    assert all(torch.equal(whole, run(block)) for block in (5, 10, 17))


def test_an_engine_that_folds_rounds_as_one_that_writes():
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = TeZO([("w", weight)], lr=1e-2, rank=2, engine="adapter")
    optimizer.position += 1e-4
    left, right = optimizer.leaves[0].factors(optimizer.settings.lift, optimizer.position)
    wanted = left @ right.float().mT
    optimizer.fold_()
    moved = weight.detach().float() - 1
    assert wanted.abs().max() < torch.finfo(torch.bfloat16).eps / 2 and (moved != 0).any()
    assert 0.5 < ((moved * wanted).sum() / wanted.square().sum()).item() < 1.5


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 1 << 40))
def test_place_noise_is_uniform_and_follows_its_row_column_and_key(key, start):
    noise = place_noise(key, start, 40, 50)
    low = (noise & 0xFFFF).double() / (1 << 16)
    assert abs(low.mean().item() - 0.5) < 0.04 and abs(low.var().item() * 12 - 1) < 0.1
    assert torch.equal(noise[3:7], place_noise(key, start + 3, 4, 50))
    assert torch.equal(noise[:, :9], place_noise(key, start, 40, 9))
    assert (noise == place_noise(key ^ 1, start, 40, 50)).sum() < 3
    assert (noise == place_noise(key ^ (1 << 62), start, 40, 50)).sum() < 3


def test_place_noise_is_the_published_hash():
    def mixed(x):
        x ^= x >> 16
        x = x * 0x7FEB352D % 2**32
        x ^= x >> 15
        x = x * 0x846CA68B % 2**32
        return x ^ x >> 16

    key, start = (123 << 40) + 987654321987, 10
    expected = [
        [mixed(mixed((start + r + key) % 2**32) ^ mixed(mixed((c + (key >> 32)) % 2**32))) for c in range(5)]
        for r in range(4)
    ]
    assert (place_noise(key, start, 4, 5).long() % 2**32).tolist() == expected
    assert math.prod(place_noise(key, 0, 0, 5).shape) == 0


@pytest.mark.parametrize(("dtype", "dropped"), [(torch.bfloat16, 16), (torch.float16, 13)])
@given(share=st.floats(0.02, 0.98), seed=st.integers(0, 1 << 40))
def test_rounding_goes_up_as_often_as_the_value_lies_above(dtype, dropped, share, seed):
    step = 2.0 ** (dropped - 23)
    values = torch.full((100, 200), 1 + share * step)
    rounded = stochastic_round(values, dtype, noise=place_noise(seed, 0, 100, 200)).double()
    assert set(rounded.unique().tolist()) == {1.0, 1 + step}
    assert abs(((rounded - 1) / step).mean().item() - share) < 0.02
