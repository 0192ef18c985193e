"""Direction and unit of a metric come from the record, whatever the metric is called."""

from __future__ import annotations

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from modicum.report import terminal_table, write
from modicum.report.evaluations import boards
from modicum.report.metrics import Metric, metric_of

# Names that a guess would rank upside down or write in the wrong unit, either way round.
NAMES = ["over_refusal", "ece", "brier", "hallucination_rate", "accuracy", "loss", "asr", "error", "exact_match", "x"]
WAYS = [(better, unit) for better in ("higher", "lower") for unit in ("share", "number")]


def record(name, better=None, unit=None, values=(0.2, 0.7)):
    more = {"better": better, "unit": unit} if better else {}
    cells = [{"model": m, "task": "t", "metric": name, "value": v} | more for m, v in zip(("low", "high"), values)]
    pair = {"a": "high", "b": "low", "task": "t", "metric": name, "difference": values[1] - values[0]} | more
    return {"job": "evaluate", "status": "done", "metrics": {"cells": cells, "pairs": [pair]}}


def page_of(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "record.json").write_text(json.dumps(content))
    page = write([folder]).read_text()
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", page))


def terminal_of(content):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    console.print(terminal_table(content))
    return console.file.getvalue()


@given(st.sampled_from(NAMES), st.sampled_from(WAYS), st.permutations([0.2, 0.7]))
def test_the_best_is_the_better_one_under_any_name(name, way, values):
    better, unit = way
    content = record(name, better, unit, values)
    [board] = boards([("", content["metrics"])])
    column = board.column("t")
    pick = max if better == "higher" else min
    assert board.best(column) == {pick(column, key=column.__getitem__)} == {*column} - board.worst(column)
    assert board.worst_tasks == column  # of one task
    text = terminal_of(content)
    assert ("↓" in text) == (better == "lower") and ("%" in text) == (unit == "share")
    bold = re.search(r"\x1b\[1m\s*([\d.]+)", text)
    assert bold and float(bold[1]) == pytest.approx(pick(values) * (100 if unit == "share" else 1))


@pytest.mark.parametrize("name", ["over_refusal", "accuracy"])
@pytest.mark.parametrize(("better", "unit"), WAYS)
def test_the_page_says_so_too(tmp_path, name, better, unit):
    text = page_of(tmp_path / "run", record(name, better, unit))
    best, worst = ("70.0%", "20.0%") if unit == "share" else ("0.700", "0.200")
    best, worst = (best, worst) if better == "higher" else (worst, best)
    assert re.search(rf"{best} \(best of the column\)", text) and re.search(rf"{worst} \(worst of the column\)", text)
    assert ("lower is better" in text) == (better == "lower")
    assert ("left is better" in text) == (better == "lower")
    assert ("+50.0 pp" in text) == (unit == "share")
    assert f"{'high' if better == 'higher' else 'low'} does best on t" in text


KNOWN = {
    "exact_match": ("higher", "share"),
    "recall": ("higher", "share"),
    "bits_per_byte": ("lower", "number"),
    "perplexity": ("lower", "number"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_records_of_version_0_1_0_are_shown_right(tmp_path, name):
    assert metric_of({"metric": name}) == Metric(name, *KNOWN[name])
    old, new = (page_of(tmp_path / "run", record(name, *way)) for way in ((), KNOWN[name]))
    assert old.partition("Provenance")[0] == new.partition("Provenance")[0]
    assert terminal_of(record(name)) == terminal_of(record(name, *KNOWN[name]))


@pytest.mark.parametrize(
    "said", [{}, {"better": "up", "unit": "share"}, {"better": "lower"}, {"better": [], "unit": {}}]
)
def test_a_metric_of_which_nothing_is_known_has_no_best(tmp_path, said):
    content = record("something")
    for row in (*content["metrics"]["cells"], *content["metrics"]["pairs"]):
        row |= said
    text = page_of(tmp_path / "run", content)
    assert "of the column" not in text and "does best" not in text and "is better" not in text
    assert "\x1b[1m" not in terminal_of(content).split("\n", 3)[-1] and "0.700" in text


def test_one_name_with_two_directions_makes_two_tables(tmp_path):
    content = record("score", "higher", "number")
    content["metrics"]["cells"] += record("score", "lower", "number")["metrics"]["cells"]
    assert [board.better for board in boards([("", content["metrics"])])] == ["higher", "lower"]
