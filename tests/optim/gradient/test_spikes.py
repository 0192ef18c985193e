import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import UnsupportedError
from modicum.optim.gradient.spikes import spike_score


def noise(n, seed=0):
    return np.random.default_rng(seed).normal(0, 1, n)


def test_one_outlier_of_eleven_deviations_is_one_spike():
    values = noise(1500)
    window = values[200:1200]
    values[1200] = window.mean() + 11 * window.std()
    report = spike_score(values)
    assert report.steps == (1200,) and report.count == 1
    assert report.score == pytest.approx(100 / 1500) and report.long_enough
    values[1200] = window.mean() + 9.5 * window.std()
    assert spike_score(values).count == 0


def test_a_value_exactly_on_the_bar_is_a_spike():
    window = [1.0, -1.0] * 4  # mean 0, deviation 1
    assert spike_score([*window, 3.0], window=8, sigma=3.0).steps == (8,)
    assert spike_score([*window, 2.999], window=8, sigma=3.0).count == 0


def test_a_fall_counts_only_on_two_sides():
    values = noise(50)
    values[40] = -100
    assert spike_score(values, window=20).steps == (40,)
    assert spike_score(values, window=20, two_sided=False).count == 0


def test_the_first_steps_and_short_series_hold_no_spikes():
    values = [1.0, 1.1, 50.0, 1.0, 1.1, 1.0]
    assert spike_score(values, window=3).count == 0
    report = spike_score(values, window=6)
    assert report.count == 0 and not report.long_enough
    assert not spike_score([], window=2).long_enough


def test_in_a_series_without_spread_every_change_is_a_spike():
    assert spike_score([0.1] * 40, window=10).count == 0
    assert spike_score([0.1] * 20 + [0.1000001] + [0.1] * 5, window=10).steps[0] == 20


def test_what_is_not_finite_is_a_spike_and_does_not_spoil_the_window():
    values = list(noise(60))
    values[30] = math.nan
    values[31] = math.inf
    values[50] = 1000.0
    assert spike_score(values, window=25).steps == (30, 31, 50)


@pytest.mark.parametrize("knobs", [{"window": 1}, {"window": 0}, {"sigma": 0}, {"sigma": math.nan}])
def test_windows_and_bars_too_small_are_refused(knobs):
    with pytest.raises(UnsupportedError, match="expected"):
        spike_score([1.0, 2.0, 3.0], **knobs)


@given(st.integers(0, 1000), st.integers(2, 20), st.floats(0.5, 5))
def test_equals_the_definition_by_hand(seed, window, sigma):
    x = noise(60, seed)
    steps = [t for t in range(window, 60) if abs(x[t] - x[t - window : t].mean()) >= sigma * x[t - window : t].std()]
    assert list(spike_score(torch.tensor(x), window=window, sigma=sigma).steps) == steps
