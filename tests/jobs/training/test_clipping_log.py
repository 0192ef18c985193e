"""What ``clipping.jsonl`` says, against a count by hand."""

import math

import pytest
import torch

from modicum.optim import AdaGC
from modicum.optim.gradient.clipper import Clipped
from modicum.optim.gradient.clipping_log import ClippingLog, read_clipping_log

# Factors of two tensors, step by step: below 1 is clipped, exactly 1 is not, 0 is erased.
FACTORS = [(1.0, 0.5), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0), (0.25, 1.0), (1.0, 0.5), (1.0, 1.0)]


def clipped(factors):
    return Clipped(torch.tensor([2.0, 3.0]), torch.tensor(factors), torch.tensor([1.0, 1.5]))


def clipper():
    return AdaGC([("a", torch.zeros(2)), ("b", torch.zeros(2))])


@pytest.mark.parametrize("flushes", [(7,), (3, 7), (1, 2, 5, 7), (2, 2, 7)])
def test_the_clip_rate_is_the_share_of_clipped_steps_since_the_last_line(flushes, tmp_path):
    log = ClippingLog(tmp_path / "clipping.jsonl", clipper(), every=3)
    for step, factors in enumerate(FACTORS, start=1):
        log.observe(clipped(factors))
        for _ in range(flushes.count(step)):
            log.flush()
    names, lines = read_clipping_log(tmp_path)
    rates = [(line["step"], line["steps"], line["clip_rate"]) for line in lines if "clip_rate" in line]
    expected, last = [], 0
    for flush in dict.fromkeys(flushes):
        part = FACTORS[last:flush]
        expected.append(
            (flush, flush - last, [float(f"{sum(f[i] < 1 for f in part) / len(part):.4g}") for i in (0, 1)])
        )
        last = flush
    assert names == ["a", "b"] and rates == expected


def test_norms_stand_at_the_first_step_and_at_every_so_many(tmp_path):
    log = ClippingLog(tmp_path / "clipping.jsonl", clipper(), every=3)
    for factors in FACTORS:
        log.observe(clipped(factors))
    log.flush()
    lines = [line for line in read_clipping_log(tmp_path)[1] if "norm" in line]
    assert [line["step"] for line in lines] == [1, 3, 6]
    assert [line["factor"] for line in lines] == [list(FACTORS[step - 1]) for step in (1, 3, 6)]
    assert all(line["norm"] == [2.0, 3.0] and line["threshold"] == [1.0, 1.5] for line in lines)


def test_a_run_that_goes_on_keeps_what_was_said_before_and_counts_from_there(tmp_path):
    path = tmp_path / "clipping.jsonl"
    first = ClippingLog(path, clipper(), every=2)
    for step, factors in enumerate(FACTORS, start=1):
        first.observe(clipped(factors))
        if step in (4, 7):
            first.flush()
    again = ClippingLog(path, clipper(), every=2, after=4)
    for factors in FACTORS[4:]:
        again.observe(clipped(factors))
    again.flush()
    lines = read_clipping_log(tmp_path)[1]
    assert [line["step"] for line in lines if "norm" in line] == [1, 2, 4, 6]
    rates = [line for line in lines if "clip_rate" in line]
    assert [line["steps"] for line in rates] == [4, 3]
    assert rates[1]["clip_rate"] == pytest.approx([1 / 3, 1 / 3], rel=1e-3)


def test_what_has_no_number_is_null(tmp_path):
    log = ClippingLog(tmp_path / "clipping.jsonl", clipper())
    log.observe(Clipped(torch.tensor([math.inf, 1.0]), torch.tensor([0.0, 1.0])))
    log.flush()
    [line] = [line for line in read_clipping_log(tmp_path)[1] if "norm" in line]
    assert line["norm"] == [None, 1.0] and line["threshold"] == [None, None]
