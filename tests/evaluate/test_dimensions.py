"""Scores over dimensions and mixtures: the cases with exact values, and laws."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import ModicumError, RecipeError
from modicum.evaluate import dimensions
from modicum.objectives.mixing import agreeing_pairs, hybrid_weights, split_by_ratio

EXPERTS = [[0.8, 0.4, 0.5], [0.6, 0.9, 0.3], [0.5, 0.45, 0.7]]
MARGINS = [[0.5, 0.2, 0.1], [0.9, -0.1, 0.4], [0.2, 0.2, 0.2], [-0.3, 0.8, 0.9]]
POINTS = [[0.7, 0.9], [0.8, 0.8], [0.75, 0.75], [0.8, 0.7], [0.6, 0.95]]


@pytest.mark.parametrize(
    ("total", "ratios", "counts"),
    [
        (100, [3, 1, 1], [60, 20, 20]),  # H6
        (10, [1, 1, 1], [4, 3, 3]),
        (7, [0.5, 0.3, 0.2], [4, 2, 1]),
        (2, [1, 1, 1], [1, 1, 0]),
    ],
)
def test_ratios(total, ratios, counts):
    assert split_by_ratio(total, ratios) == counts


@given(st.integers(0, 500), st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(lambda r: sum(r) > 0.01))
def test_shares_sum_up_and_lie_beside_their_quota(total, ratios):
    counts = split_by_ratio(total, ratios)
    assert sum(counts) == total
    assert all(abs(n - total * r / sum(ratios)) < 1 + 1e-6 for n, r in zip(counts, ratios))


def test_agreement():  # H7
    assert agreeing_pairs(MARGINS) == [0, 2]
    assert agreeing_pairs(MARGINS, rank="min") == [2, 0, 1, 3]
    for arrays in (np.array(MARGINS), torch.tensor(MARGINS)):
        assert agreeing_pairs(arrays, rank="min") == [2, 0, 1, 3]  # type: ignore[arg-type]
    assert agreeing_pairs(MARGINS, rank="mean") == [3, 1, 0, 2]
    assert agreeing_pairs(MARGINS, rank="mean", keep=0.5) == [3, 1]
    assert agreeing_pairs(MARGINS, rank="gated", gates=[[1, 0, 0]] * 4) == [1, 0, 2, 3]
    assert agreeing_pairs([[-1.0]]) == []


def test_hybrid_weights():  # H8
    first = hybrid_weights([1 / 3] * 3, [0.9, 0.6, 0.6])
    assert first == pytest.approx([0.270291, 0.364855, 0.364855], abs=1e-6)
    assert hybrid_weights(first, [0.8, 0.7, 0.5], eta=2) == pytest.approx([0.195759, 0.322752, 0.481489], abs=1e-6)


def test_collaboration_and_conflict():  # H9, H10
    found = dimensions.collaboration(0.5, EXPERTS)
    np.testing.assert_allclose(found, [[1, -0.25, 0], [1 / 3, 1, -1], [0, -0.125, 1]], atol=1e-12)
    assert dimensions.collaboration([0.8, 0.5, 0.5], EXPERTS)[1] == [None, 1.0, pytest.approx(-1)]
    assert dimensions.collaboration(0.5, EXPERTS, undetermined=[False, True, False])[1][1] is None
    harm = dimensions.alignment_conflict(0.5, EXPERTS)
    assert harm == pytest.approx([0.005, 0.02, 0.00125]) and sum(harm) / 3 == pytest.approx(0.00875)


def test_rank_correlations():  # H11
    assert dimensions.rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(0.8)
    assert dimensions.rank_correlation([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(0.948683, abs=1e-6)
    assert dimensions.rank_correlation([1, 1], [1, 2]) is None


def test_scores_of_a_merge():  # H12
    scores, own = [0.6, 0.72, 0.63], [0.8, 0.9, 0.7]
    assert dimensions.normalised(scores, own) == pytest.approx([0.75, 0.8, 0.9])
    assert dimensions.normalised_average(scores, own) == pytest.approx(0.816667, abs=1e-6)
    assert dimensions.worst_dimension(scores, own) == pytest.approx(0.75)
    assert dimensions.share_of_gain(scores, own, 0.5) == pytest.approx([1 / 3, 0.55, 0.65])
    assert dimensions.normalised_average([0.5], [0.0]) is None and dimensions.worst_dimension([0.5], [0.0]) is None


def test_fronts():  # H13
    assert dimensions.pareto_front(POINTS) == [0, 1, 4]
    assert dimensions.hypervolume(POINTS) == pytest.approx(0.74)
    assert dimensions.pareto_front([[1, 1], [1, 1]]) == [0, 1]
    assert dimensions.hypervolume(POINTS, [0.9, 0.0]) == 0


points = st.integers(1, 3).flatmap(
    lambda d: st.lists(
        st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.75]), min_size=d, max_size=d), min_size=1, max_size=6
    )
)


@given(points)
def test_the_volume_is_that_of_the_cells_below_some_point(points):
    edges = [0.0, 0.1, 0.25, 0.5, 0.75]
    cells = np.stack(np.meshgrid(*[range(4)] * len(points[0]), indexing="ij"), -1).reshape(-1, len(points[0]))
    covered = [c for c in cells if any(all(edges[i + 1] <= x for i, x in zip(c, p)) for p in points)]
    expected = math.fsum(math.prod(edges[i + 1] - edges[i] for i in c) for c in covered)
    assert dimensions.hypervolume(points) == pytest.approx(expected)
    front = dimensions.pareto_front(points)
    assert front and dimensions.hypervolume([points[i] for i in front]) == pytest.approx(expected)


def test_declining_and_calibration():  # H14, H15
    found = dimensions.declining(right=60, wrong=20, over_declined=20, declined=70, answered=30)
    assert (found.f1, found.false_confidence) == (pytest.approx(0.736842, abs=1e-6), pytest.approx(0.30))
    assert (found.over_refusal, found.truthful) == (pytest.approx(0.20), pytest.approx(0.75))
    confidences, right = [0.9, 0.8, 0.6, 0.3], [1, 1, 0, 0]
    assert dimensions.calibration_error(confidences, right, bins=4) == pytest.approx(0.30)
    assert dimensions.brier(confidences, right) == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_by_ratio(3, [1, -1]), "ratios are .*at least 0 that do not sum to 0"),
        (lambda: split_by_ratio(3, [0, 0]), "ratios are"),
        (lambda: agreeing_pairs([[0.1, math.nan]]), "Pair 0: scorer 1 returned NaN"),
        (lambda: agreeing_pairs([[0.1, 0.2], [0.1]]), "Pair 1 has 1 scores, expected 2"),
        (lambda: agreeing_pairs(MARGINS, keep=0), "keep is 0"),
        (lambda: agreeing_pairs(MARGINS, rank="best"), "rank is 'best'"),
        (lambda: agreeing_pairs(MARGINS, rank="gated"), "needs a weight for each scorer of pair 0"),
        (lambda: hybrid_weights([1, 1], [0.5]), "a finite number for each of 2 weights"),
        (lambda: dimensions.collaboration(0.5, [[0.5, 0.4]]), "1 experts have 2 scores"),
        (lambda: dimensions.alignment_conflict([0.5], EXPERTS), "The base has 1 scores"),
        (lambda: dimensions.pareto_front([[0.5], [math.nan]]), "Row 1 holds nan in dimension 0"),
        (
            lambda: dimensions.declining(right=1, wrong=0, over_declined=0, declined=0, answered=0),
            "at least one of each",
        ),
        (lambda: dimensions.brier([1.5], [1]), "outside"),
        (lambda: dimensions.brier([0.5], [2]), "An outcome is 2, expected 1"),
        (lambda: dimensions.calibration_error([0.5], [1], bins=0), "bins is 0, expected at least 1"),
        (lambda: dimensions.collaboration(0.5, EXPERTS, undetermined=[True]), "undetermined has 1 columns, expected 3"),
        (lambda: dimensions.hypervolume([[]]), "Row 0 has no scores"),
    ],
)
def test_numbers_that_say_nothing_are_refused(call, message):
    with pytest.raises((ModicumError, RecipeError), match=message):
        call()
