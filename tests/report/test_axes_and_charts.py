"""Whatever a record holds, a page is written: axes, labels, thinning, charts."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modicum.report import write
from modicum.report.axes import MOST_POINTS, log_ticks, spread, thin, ticks
from modicum.report.charts import Line, Scale, line_chart
from modicum.report.sections.training import smooth
from modicum.report.text import number
from report_runs import (
    training_log,
    write_run,
)
from test_report import read

FINITE = st.floats(-1e12, 1e12, allow_subnormal=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ROW = st.dictionaries(
    st.sampled_from(["model", "task", "metric", "value", "low", "high", "n", "a", "b", "difference", "better", "unit"]),
    JSON | st.sampled_from(["higher", "lower", "share", "number"]),
)
LAYERS = st.fixed_dictionaries(
    {"names": st.lists(st.sampled_from(["model.layers.0.a", "h.3.b.weight", "x", "blocks.1."]), max_size=4)},
    optional={
        key: st.dictionaries(st.text(max_size=4), st.lists(JSON, max_size=5), max_size=3) | JSON
        for key in ("norms", "cosines", "conflict")
    },
)
METRICS = st.fixed_dictionaries(
    {},
    optional={
        "cells": st.lists(ROW, max_size=4) | JSON,
        "pairs": st.lists(ROW, max_size=4) | JSON,
        "layers": LAYERS,
        "x": JSON,
    },
)


@given(
    metrics=METRICS,
    record=st.dictionaries(
        st.sampled_from(["notes", "stages", "outputs", "environment", "seconds", "job", "status", "error"]), JSON
    ),
)
def test_whatever_a_record_holds_the_page_is_written(
    tmp_path_factory: pytest.TempPathFactory, metrics: Any, record: Any
) -> None:
    run = write_run(tmp_path_factory.mktemp("junk"), "odd", log=training_log(2, 2, 1), metrics=metrics)
    whole = json.loads((run / "record.json").read_text()) | record
    (run / "record.json").write_text(json.dumps(whole))
    (run / "recipe.yaml").write_text(yaml.safe_dump({"stages": [metrics, 3], "seed": 1}))
    read(write([run]))


@given(st.lists(st.floats(0, 300), min_size=1, max_size=12).map(sorted))
def test_labels_keep_their_order_and_their_distance(tops: list[float]) -> None:
    placed = spread(tops, 17, 300)
    assert len(placed) == len(tops)
    assert all(b - a >= 17 - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= -1e-6
    if all(b - a >= 17 for a, b in itertools.pairwise(tops)):
        assert placed == pytest.approx(tops)


@given(FINITE, FINITE, st.integers(2, 8))
def test_ticks_enclose_what_they_measure(a: float, b: float, count: int) -> None:
    low, high = min(a, b), max(a, b)
    marks = ticks(low, high, count)
    slack = 1e-6 * max(abs(low), abs(high), 1e-12)
    assert 2 <= len(marks) <= count + 3
    assert marks[0] <= low + slack and marks[-1] >= high - slack
    assert marks == sorted(set(marks))


@given(st.floats(1e-9, 1e9), st.floats(1, 1e9))
def test_logarithmic_ticks_enclose_what_they_measure(low: float, ratio: float) -> None:
    marks = log_ticks(low, low * ratio)
    assert marks[0] <= low * (1 + 1e-9) and marks[-1] >= low * ratio * (1 - 1e-9)
    assert len(marks) >= 2 and marks == sorted(set(marks))


@given(st.integers(0, 5000), st.data())
def test_thinning_keeps_the_extremes_and_the_gaps(size: int, data: st.DataObject) -> None:
    spike = data.draw(st.integers(0, max(0, size - 1)))
    gap = data.draw(st.integers(0, max(0, size - 1)))
    points = [(float(i), None if i == gap else 1e6 if i == spike else math.sin(i)) for i in range(size)]
    kept = thin(points)
    assert len(kept) <= max(MOST_POINTS, 0) + 3 and kept == sorted(kept, key=lambda point: point[0])
    if size:
        assert points[gap] in kept and points[spike] in kept


def test_smoothing_keeps_a_constant_and_a_gap() -> None:
    points = [(float(i), None if i == 50 else 2.0) for i in range(200)]
    assert smooth(points) == points


@given(st.floats() | st.integers() | st.none() | st.text())
def test_any_value_can_be_written(value: object) -> None:
    assert number(value)


def test_a_scale_with_a_center_is_symmetric_around_it() -> None:
    scale = Scale.of([-0.1, None, 0.4], center=0.0)
    assert (scale.low, scale.high) == (-0.4, 0.4)
    assert scale.ink(-0.4) == ("warm", 1.0) and scale.ink(0.2) == ("cool", 0.5)
    assert Scale.of([0.5, 0.75], center=0.5, warm="high").ink(0.75) == ("warm", 1.0)
    assert Scale.of([2.0, 4.0]).ink(1.0) == ("cool", 0.25)


def test_a_chart_without_values_is_not_drawn() -> None:
    assert line_chart([Line([(1.0, None)])], title="t", x_label="x", describe="d") == ""
