"""Passes in registers against NumPy: equal magnitudes, signed zeros, subnormals, one entry, all entries equal."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modicum.registry import merge_method
from modicum.weights.kernels import fused, selection
from modicum.weights.kernels.blocks import fold
from modicum.weights.kernels.combine import Trimmed, combiner
from modicum.weights.methods import sce

F32 = np.float32
NUMBERS = [0.0, -0.0, 1.0, -1.0, 1.0078125, 0.5, -2.0, 3e38, 1e-39, -1e-39, 2.0**-133, -(2.0**-133), 1e-30]
SETTINGS = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)


@pytest.fixture(autouse=True)
def everything_is_compiled(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(fused, "LEAST", 0)
    monkeypatch.setattr(selection, "SMALL", 0)


@st.composite
def models(draw, largest=2.0):
    """A base and experts as rows; experts often equal to the base, or to one another."""
    n, size = draw(st.integers(1, 6)), draw(st.integers(1, 40))
    pool = [x for x in NUMBERS if abs(x) <= largest]
    number = st.sampled_from(draw(st.lists(st.sampled_from(pool), min_size=1, max_size=4)))
    rows = draw(st.lists(st.lists(number, min_size=size, max_size=size), min_size=n + 1, max_size=n + 1))
    return torch.tensor(rows).bfloat16()


def deltas_of(rows):
    numbers = rows.float().numpy()
    return numbers[0], numbers[1:] - numbers[0]


def window(delta, top, keep):
    """Zero but for the ``keep`` largest after the ``top`` largest; of equal ones those that come first."""
    kept, order = np.zeros_like(delta), np.argsort(-np.abs(delta), kind="stable")
    kept[order[top : top + keep]] = delta[order[top : top + keep]]
    return kept


def summed(deltas, weights):
    total = np.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights):
        total = total + delta * weight
    return total


def elected(deltas, weights, normalize):
    deltas = [delta * weight for delta, weight in zip(deltas, weights)]
    halves = [F32(0.5)] * len(deltas)
    total = summed(deltas, halves)
    chosen = summed(np.abs(deltas), halves) + np.abs(total)
    if normalize:
        agreeing = sum((np.sign(d) == np.where(total >= 0, 1, -1)).astype(F32) for d in deltas)
        chosen = chosen / np.maximum(agreeing, 1)
    return np.copysign(chosen, total)


def assert_same(found, base, merged):
    expected = torch.from_numpy(np.atleast_1d(base + merged)).bfloat16()
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), (found, expected)


@given(models(3e38), st.data())
@SETTINGS
def test_windows_of_magnitudes_are_summed_or_elected_as_numpy_does(rows, data):
    n, size = len(rows) - 1, rows.shape[1]
    top = [data.draw(st.integers(0, size - 1)) for _ in range(n)]
    keep = [data.draw(st.integers(1, size - t)) for t in top]
    elect, normalize = data.draw(st.sampled_from([("none", False), ("ties", False), ("ties", True)]))
    # Mean weights are counted only where all are alike.
    weights = [1.0] * n if normalize else [data.draw(st.sampled_from([1.0, 0.25, -0.5])) for _ in range(n)]
    base, *experts = rows
    wanted = [[k for k in (t, t + m) if 0 < k < size] for t, m in zip(top, keep)]
    found = selection.find_cuts(base, experts, wanted)
    cuts = []
    for t, m, several in zip(top, keep, map(list, found)):
        without = several.pop(0) if t else None
        cuts.append((several.pop(0) if t + m < size else None, without))
    combine = combiner(torch.tensor(weights), elect=elect, normalize=normalize)
    merged = fold(base, experts, Trimmed(cuts, combine))
    with np.errstate(all="ignore"):
        origin, deltas = deltas_of(rows)
        kept = [window(*given) for given in zip(deltas, top, keep)]
        shares = [F32(w) for w in weights]
        expected = summed(kept, shares) if elect == "none" else elected(kept, shares, normalize)
        if np.isfinite(expected).all():
            assert_same(merged, origin, expected)


@given(models(), st.data())
@SETTINGS
def test_masked_deltas_are_summed_or_elected_as_numpy_does(rows, data):
    n, size = len(rows) - 1, rows.shape[1]
    masks = np.array(data.draw(st.lists(st.booleans(), min_size=n * size, max_size=n * size))).reshape(n, size)
    ratios = [data.draw(st.sampled_from([1.0, 2.0, 1.2345])) for _ in range(n)]
    elect, normalize = data.draw(st.sampled_from([("none", False), ("ties", False), ("ties", True)]))
    combine = combiner(torch.ones(n), elect=elect, normalize=normalize)
    drawn = [None if mask.all() else mask for mask in masks]
    parts = combine.parts._replace(factors=lambda t, _: drawn[t], ratios=torch.tensor(ratios))
    base, *experts = rows
    out = torch.empty_like(base)
    fused.fold(base, experts, parts, out, share=1.0, sizes=[size])
    origin, deltas = deltas_of(rows)
    kept = [delta * mask.astype(F32) * F32(ratio) for delta, mask, ratio in zip(deltas, masks, ratios)]
    ones = [F32(1)] * n
    assert_same(out, origin, summed(kept, ones) if elect == "none" else elected(kept, ones, normalize))


@given(models(), st.sampled_from([0.1, 0.5, 1.0]))
@SETTINGS
def test_entries_of_largest_variance_are_merged_as_the_formulas_say(rows, select):
    base, *experts = rows
    found = sce(base, experts, select=select).double().numpy()
    origin, deltas = deltas_of(rows)
    if select < 1 and len(experts) > 1:
        shares = [F32(1 / len(experts))] * len(experts)
        centred = deltas - deltas[0]
        variance = summed((centred - summed(centred, shares)) ** 2, shares)
        count = max(1, int(select * np.count_nonzero(variance)))
        deltas = deltas * (window(variance, 0, count) > 0)
    agrees = deltas * np.where(summed(deltas, [F32(1)] * len(experts)) >= 0, 1, -1) > 0
    energy = (deltas.astype(float) ** 2).sum(1)
    weights = energy / energy.sum() if energy.sum() else np.full(len(experts), 1 / len(experts))
    divisor = (weights[:, None] * agrees).sum(0)
    merged = np.where(divisor > 0, (weights[:, None] * agrees * deltas).sum(0) / np.where(divisor > 0, divisor, 1), 0)
    np.testing.assert_allclose(found, origin + merged, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 2047, 2049, 5000])
def test_all_entries_may_lie_within_a_bracket(size):
    base = torch.zeros(size, dtype=torch.bfloat16)
    experts = [torch.full_like(base, 2.0 + t) for t in range(3)]
    found = fused.count(base, experts, [[(1.0, 9.0)]] * 3)
    assert found is not None
    for t, ((above, high, low, inside),) in enumerate(found):
        assert (above, high, low) == (0, 0, 0)
        np.testing.assert_array_equal(inside, np.full(size, 2.0 + t, F32))


ALONE = [n for n, e in merge_method.items() if not e.facts.base and not e.facts.two and e.facts.experts == 1]


@pytest.mark.parametrize("method", [n for n in ALONE if merge_method[n].facts.statistics is None])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_model_alone_is_its_own_merge(method, dtype):
    only = torch.tensor([[1.0, -2.0, 0.5, 1.0078125, 0.0]] * 3).to(dtype)
    entry = merge_method[method]
    assert torch.equal(entry.function(None, [only], **entry.knobs({})), only)
