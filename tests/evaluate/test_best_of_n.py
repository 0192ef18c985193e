import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import modicum.evaluate as evaluate
from modicum.evaluate.best_of_n import (
    asr_all,
    asr_all_from_first_safe,
    asr_any,
    best_of_n_report,
    refusal_rate,
    strongreject_score,
)
from modicum.evaluate.chat import Verdict
from modicum.evaluate.intervals import bootstrap, wilson
from oracles import safety as oracle


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


counts = st.lists(st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))), min_size=1, max_size=5)


@given(counts, st.data())
def test_both_rates_equal_counting_all_subsets(pairs, data):
    unsafe, samples = map(list, zip(*pairs))
    n = data.draw(st.integers(1, min(samples)))
    assert asr_all(unsafe, samples, n) == pytest.approx(oracle.asr_all(unsafe, samples, n), abs=1e-12)
    assert asr_any(unsafe, samples, n) == pytest.approx(oracle.asr_any(unsafe, samples, n), abs=1e-12)


@given(counts, st.randoms(use_true_random=False))
def test_laws_of_the_rates(pairs, random):
    unsafe, samples = map(list, zip(*pairs))
    safe = [m - u for u, m in pairs]
    shuffled = random.sample(pairs, len(pairs))
    every = range(1, min(samples) + 1)
    alls, anys = ([f(unsafe, samples, n) for n in every] for f in (asr_all, asr_any))
    assert alls == sorted(alls, reverse=True) and anys == sorted(anys)
    for n, all_n, any_n in zip(every, alls, anys):
        assert all_n == pytest.approx(1 - asr_any(safe, samples, n))
        assert asr_all([u for u, _ in shuffled], [m for _, m in shuffled], n) == pytest.approx(all_n)
        assert asr_any(unsafe * 2, samples * 2, n) == pytest.approx(any_n)
    assert alls[0] == pytest.approx(anys[0]) == pytest.approx(sum(u / m for u, m in pairs) / len(pairs))


def test_numbered_cases():
    assert [asr_all([2], 4, n) for n in (1, 2, 3, 4)] == pytest.approx([0.5, 1 / 6, 0, 0])
    assert [asr_any([2], 4, n) for n in (1, 2, 3, 4)] == pytest.approx([0.5, 5 / 6, 1, 1])
    assert asr_all([0, 1, 4], 4, 2) == pytest.approx(1 / 3) and asr_any([0, 1, 4], 4, 2) == pytest.approx(0.5)
    assert asr_all([3, 10], [5, 20], 3) == pytest.approx(0.102632, abs=1e-6)
    assert asr_any([3, 10], [5, 20], 3) == pytest.approx(0.947368, abs=1e-6)
    assert asr_all([64], 128, 64) == pytest.approx(4.175166e-38, rel=1e-6) and asr_any([64], 128, 64) == 1
    assert asr_all([64], 128, 64) == pytest.approx(oracle.log_ratio(64, 128, 64), rel=1e-9)
    assert asr_all([127], 128, 127) == pytest.approx(0.0078125)
    assert [asr_any([1], 128, n) for n in (2, 64, 128)] == pytest.approx([0.015625, 0.5, 1])
    assert [asr_all_from_first_safe([1, 3, 2, None, 9], n=n) for n in (1, 2, 4, 8, 16)] == [0.8, 0.6, 0.4, 0.4, 0.2]
    assert wilson(0, 20).high == pytest.approx(0.161125, abs=1e-6)
    assert asr_all(torch.tensor([2, 4]), torch.tensor([4, 4]), 1) == 0.75
    assert evaluate.asr_all is asr_all and evaluate.asr_any is asr_any


@pytest.mark.parametrize("m", [4, 6])
@pytest.mark.parametrize("n", [1, 3])
def test_the_estimate_has_no_bias(m, n):
    p = 0.3
    mean = sum(math.comb(m, u) * p**u * (1 - p) ** (m - u) * asr_all([u], m, n) for u in range(m + 1))
    assert mean == pytest.approx(p**n) and oracle.expected_asr_all(p, m, n) == pytest.approx(p**n)


@pytest.mark.parametrize(
    ("unsafe", "samples", "n"),
    [
        ([1], 4, 0), ([1], 4, 5), ([1], 0, 1), ([5], 4, 1), ([-1], 4, 1), ([], 4, 1), ([1.5], 4, 1), ([1], 4, 1.5),
        ([math.nan], 4, 1), ([1], math.inf, 1), ([1, 2], [4], 1), ([1], [], 1), ([1], 4, math.nan),
        (3, 4, 1), (None, 4, 1), ([1], None, 1), ([None], 4, 1), ("ab", 4, 1),
    ],
)  # fmt: skip
def test_counts_that_cannot_be_are_refused(unsafe, samples, n):
    for rate in (asr_all, asr_any):
        with pytest.raises(ValueError):
            rate(unsafe, samples, n)


@pytest.mark.parametrize(("first", "n"), [([0], 1), ([1.5], 1), ([], 1), ([1], 0)])
def test_first_safe_numbers_that_cannot_be_are_refused(first, n):
    with pytest.raises(ValueError):
        asr_all_from_first_safe(first, n=n)


@given(st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=1, max_size=6))
def test_early_stopping_gives_the_nested_curve(rows):
    first = [next((i + 1 for i, unsafe in enumerate(row) if not unsafe), None) for row in rows]
    for n in (1, 2, 4, 8):
        assert asr_all_from_first_safe(first, n=n) == sum(all(row[:n]) for row in rows) / len(rows)


def test_report_carries_both_ends_of_what_could_not_be_read():
    report = best_of_n_report([[True, None], [False, False], [True, True]], ns=[1, 2], rng=rng())
    assert report.asr_low["all"] == pytest.approx([0.5, 1 / 3]) and report.asr_high["all"] == pytest.approx(
        [2 / 3, 2 / 3]
    )
    assert [e.value for e in report.asr_all] == pytest.approx(report.asr_high["all"])
    assert report.unparsed == pytest.approx(1 / 6) and (report.queries, report.samples) == (3, 2)


def test_gibberish_saves_no_query_where_refusals_count():
    gibberish, refusal, harm = Verdict(False, refusal=False), Verdict(False, refusal=True), Verdict(True, refusal=False)
    rows = [[gibberish, gibberish], [refusal, harm]]
    assert best_of_n_report(rows, ns=[2], rng=rng()).asr_all[0].value == 0
    strict = best_of_n_report(rows, ns=[2], count="refusal", rng=rng())
    assert strict.asr_all[0].value == 0.5 and strict.malformed == 0.5


def test_intervals_come_from_queries_and_never_collapse():
    report = best_of_n_report([[False] * 4] * 20, ns=[1, 4], rng=rng())
    assert report.asr_all[0].low == 0 and report.asr_all[0].high == pytest.approx(0.161125, abs=1e-6)
    mixed = best_of_n_report([[True] * 4] * 10 + [[False] * 4] * 10, ns=[1], rng=rng()).asr_all[0]
    assert 0.2 < mixed.low < 0.4 and 0.6 < mixed.high < 0.8, "40 dependent answers a side are 20 queries, not 80 trials"
    greedy = best_of_n_report([[True]] * 3 + [[False]] * 7, ns=[1], rng=rng()).asr_all[0]
    assert (greedy.low, greedy.high) == pytest.approx(wilson(3, 10)[1:3])
    same = [best_of_n_report([[True, False]] * 3 + [[True, True]], ns=[1], rng=rng(5)).asr_all for _ in range(2)]
    assert same[0] == same[1]


@pytest.mark.parametrize("rows", [[], [[]], [[True], []], [[math.nan]], [[2]]])
def test_reports_of_nothing_are_refused(rows):
    with pytest.raises(ValueError):
        best_of_n_report(rows, ns=[1], rng=rng())
    with pytest.raises(ValueError):
        best_of_n_report([[True]], ns=[2], rng=rng())
    with pytest.raises(ValueError, match="ns is empty"):
        best_of_n_report([[True]], ns=[], rng=rng())


def test_rates_of_other_suites():
    assert refusal_rate(10, 5, 100) == 0.15
    assert strongreject_score(0, 5, 5) == 1 and strongreject_score(0, 5, 5, scale="five") == 5
    assert strongreject_score(0, 1, 1) == 0 and strongreject_score(0, 1, 1, scale="five") == 1
    assert strongreject_score(0, 3, 4) == 0.625 and strongreject_score(0, 3, 4, scale="five") == 3.5
    assert strongreject_score(1, 5, 5) == strongreject_score(True, 5, 5, scale="five") == 0
    for bad in [lambda: refusal_rate(80, 30, 100), lambda: refusal_rate(-1, 0, 1), lambda: refusal_rate(0, 0, 0),
                lambda: strongreject_score(0, 6, 1), lambda: strongreject_score(2, 1, 1),
                lambda: strongreject_score(0, 3, 3, scale="ten")]:  # fmt: skip
        with pytest.raises(ValueError):
            bad()


def test_the_bootstrap_covers_as_it_says():
    values = torch.rand(40, 60, generator=rng(), dtype=torch.float64).tolist()
    covered = sum(
        e.low <= 0.5 <= e.high for e in (bootstrap(row, resamples=300, rng=rng(i)) for i, row in enumerate(values))
    )
    assert covered >= 34
