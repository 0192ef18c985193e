from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.evaluate import mean, paired_proportions, ratio, wilson
from oracles import evaluate as oracle

LEVELS = st.sampled_from([0.5, 0.8, 0.95, 0.999])
VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=20)


@st.composite
def counts(draw):
    n = draw(st.integers(1, 300))
    return draw(st.integers(0, n)), n


@given(counts(), LEVELS)
def test_wilson_solves_the_score_equation(count, level):
    found = wilson(*count, level=level)
    assert (found.low, found.high) == pytest.approx(oracle.wilson(*count, level), abs=1e-7)
    assert 0 <= found.low <= found.value <= found.high <= 1


def test_wilson_mirrors_successes_and_failures():
    a, b = wilson(3, 17), wilson(14, 17)
    assert (a.low, a.high) == pytest.approx((1 - b.high, 1 - b.low))


@given(VALUES, LEVELS)
def test_mean_and_ratio_equal_the_oracle(values, level):
    sizes = [1 + abs(v) for v in values]
    for found, expected in (
        (mean(values, level=level), oracle.ratio(values, [1.0] * len(values), level)),
        (ratio(values, sizes, level=level), oracle.ratio(values, sizes, level)),
    ):
        assert (found.value, found.low, found.high) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60), LEVELS)
def test_paired_difference_equals_the_oracle(pairs, level):
    a, b = zip(*pairs, strict=True)
    found, swapped = paired_proportions(a, b, level=level), paired_proportions(b, a, level=level)
    assert (found.low, found.high) == pytest.approx(oracle.paired_proportions(a, b, level), abs=1e-7)
    assert found.value == pytest.approx((sum(a) - sum(b)) / len(a))
    assert (swapped.value, swapped.low, swapped.high) == pytest.approx((-found.value, -found.high, -found.low))


def test_pairing_narrows_the_interval_of_models_that_solve_the_same_items():
    a = [True] * 50 + [False] * 50
    b = [True] * 45 + [False] * 55
    paired = paired_proportions(a, b)
    assert paired.low > 0
    assert wilson(50, 100).low < wilson(45, 100).high  # apart, the two say nothing


def test_equal_models_differ_by_zero_with_an_interval_that_is_not_a_point():
    found = paired_proportions([True] * 10, [True] * 10)
    assert found.value == 0
    assert found.low < 0 < found.high


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    # Exact, not sampled: the chance of each count is binomial.
    n, p = 30, 0.1
    covered = sum(
        math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k, n).low <= p <= wilson(k, n).high
    )
    assert 0.92 < covered < 0.99


def test_one_item_has_no_spread():
    assert mean([3.0]) == (3.0, None, None, 1)


@pytest.mark.parametrize(
    "call",
    [
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: mean([]),
        lambda: ratio([1.0], [0.0]),
        lambda: ratio([1.0], [1.0, 2.0]),
        lambda: paired_proportions([True], [True, False]),
        lambda: wilson(1, 2, level=1.0),
        lambda: mean([1.0], level=0.0),
    ],
)
def test_impossible_counts_and_levels_are_refused(call):
    with pytest.raises(RecipeError, match="expected"):
        call()
