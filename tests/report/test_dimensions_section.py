"""Dimensions: methods with intervals and worst dimension, pairing by seed, blanks where nothing is determined."""

from __future__ import annotations

import json
import re

import pytest

from modicum.report import write
from modicum.report.dimensions import read
from modicum.report.runs import load
from modicum.report.sections.dimensions import dimensions
from report_runs import write_run

TASKS = ("helpful", "honest", "harmless")
BASE = (0.5, 0.5, 0.5)
OWN = {"helpful": (0.8, 0.4, 0.5), "honest": (0.6, 0.9, 0.3), "harmless": (0.5, 0.45, 0.7)}  # H9
MERGE, MIXTURE = (0.6, 0.72, 0.63), (0.7, 0.6, 0.6)  # H12


def score(arm, role, values, seed, shift=0.0, axes=None, **more):
    of = {"role": role, "axes": {**(axes or {}), "seed": seed}}
    rows = []
    for task, value in zip(TASKS, values):
        value += shift * seed
        rows.append(
            {"stage": "test", "cell": f"test-{arm}-{seed}", "axes": {"seed": seed}, "arm": arm, "of": of, "model": arm}
            | {"task": task, "metric": "pair_accuracy", "better": "higher", "unit": "share", "n": 100}
            | {"value": value, "low": value - 0.05, "high": value + 0.05, "items": "x"} | more
        )  # fmt: skip
    return rows


def grid(seeds=(0, 1, 2), **more):
    scores, cells = [], []
    for seed in seeds:
        wobble = 0.001
        scores += score("base", "base", BASE, seed)
        for name, values in OWN.items():
            scores += score(f"expert {name}", "expert", values, seed, wobble, {"dimension": name})
        scores += score("merged tsv", "merge", MERGE, seed, wobble, {"method": "tsv"})
        scores += score("mixture", "mixture", MIXTURE, seed, 2 * wobble)
        scores += score("sequential", "continual", (0.55, 0.6, 0.65), seed, wobble)
        detail = [{"model": "merged tsv", "task": task, "words": 7.0 + seed} for task in TASKS]
        cells.append({"cell": f"test-merged tsv-{seed}", "metrics": {"cells": detail}})
    judged = [row | {"stage": "validation", "value": 0.99} for row in score("merged tsv", "merge", MERGE, 0)]
    chosen = [{"axis": "method", "by": "validation"}]
    return {
        "grid": 1,
        "axes": {},
        "seeds": list(seeds),
        "cells": cells,
        "chosen": chosen,
        "scores": judged + scores,
    } | more


def drawn(tmp_path, content):
    write_run(tmp_path / "run", job="grid", metrics={})
    (tmp_path / "run" / "grid.json").write_text(json.dumps(content))
    return dimensions(load([tmp_path / "run"]))


def test_figures_are_those_of_the_cases(tmp_path):
    drawn(tmp_path, grid(seeds=(0,)))
    found = read(tmp_path / "run")
    assert found.dimensions == [*TASKS]
    names, matrix, conflict = found.matrix()
    assert names == [*TASKS]
    flat = [x for row in matrix for x in row]
    assert flat == pytest.approx([1, -0.25, 0, 1 / 3, 1, -1, 0, -0.125, 1])  # H9
    assert conflict == pytest.approx([0.005, 0.02, 0.00125])  # H10
    merge = next(arm for arm in found.arms if arm.role == "merge")
    assert found.average(merge).value == pytest.approx(0.816667, abs=1e-6)  # H12
    assert found.worst(merge).value == pytest.approx(0.75) and found.average(merge).low is None
    front, volume = found.front()
    assert {arm.role for arm in front} == {"merge", "mixture", "continual"} and volume > 0


def test_a_merge_minus_a_mixture_is_paired_by_seed(tmp_path):
    drawn(tmp_path, grid())
    found = read(tmp_path / "run")
    merge, mixture = (next(arm for arm in found.arms if arm.role == role) for role in ("merge", "mixture"))
    gap = found.difference(merge, mixture)
    by_seed = [
        sum((m + 0.001 * s - x - 0.002 * s) / (own + 0.001 * s) for m, x, own in zip(MERGE, MIXTURE, (0.8, 0.9, 0.7)))
        / 3
        for s in range(3)
    ]
    assert gap.n == 3 and gap.value == pytest.approx(sum(by_seed) / 3) and gap.low < gap.value < gap.high
    assert merge.scores[0]["helpful"] == 0.6  # not the score by which it was chosen


def test_the_best_of_several_says_that_it_was_chosen_by_these_scores(tmp_path):
    content = grid()
    told = "each the best of 2 merges and 1 mixture by these very scores"
    assert not any(told in str(finding) for finding in drawn(tmp_path / "one", content).findings)
    for seed in range(3):
        content["scores"] += score("merged ties", "merge", BASE, seed)
    assert any(told in str(finding) for finding in drawn(tmp_path / "two", content).findings)


def test_what_is_not_determined_stays_blank(tmp_path):
    content = grid(seeds=(0,))
    for row in content["scores"]:
        if row["task"] == "harmless":
            row["low"], row["high"] = row["value"] - 0.3, row["value"] + 0.3
    section = drawn(tmp_path, content)
    _, matrix, _ = read(tmp_path / "run").matrix()
    assert [row[2] for row in matrix] == [None] * 3 and matrix[0][0] == 1
    text = re.sub("<[^>]*>", " ", str(section.body))
    assert "Blank columns (harmless)" in text
    assert str(section.body).count("<rect") == 6


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_an_expert_that_loses_in_its_own_dimension_has_no_column(tmp_path, seeds):
    content = grid(seeds=seeds)
    for row in content["scores"]:
        if row["task"] == "harmless" and row["of"]["axes"].get("dimension") == "harmless":
            row |= {"value": 0.3, "low": 0.29, "high": 0.31}  # the base has 0.5
    section = drawn(tmp_path, content)
    _, matrix, _ = read(tmp_path / "run").matrix()
    assert [row[2] for row in matrix] == [None] * 3 and None not in matrix[0][:2]
    assert "Blank columns (harmless): their own expert gains nothing" in str(section.body)


@pytest.mark.parametrize(("unit", "ends"), [("share", (0.0, 1.0)), ("points", (-0.742, 1.742))])
def test_only_the_intervals_of_shares_end_at_0_and_1(tmp_path, unit, ends):
    content = grid()
    for row in content["scores"]:
        row["unit"] = unit
        if row["arm"] == "merged tsv" and row["task"] == "honest":
            row["value"] = (0.0, 0.5, 1.0)[row["axes"]["seed"]]
    section = drawn(tmp_path, content)
    merge = next(arm for arm in read(tmp_path / "run").arms if arm.role == "merge")
    found = merge.score("honest")
    assert (found.low, found.high) == pytest.approx(ends, abs=1e-3)
    told = "50.0% [0.0%, 100.0%]" if unit == "share" else "0.500 [\u22120.742, 1.74]"
    assert told in str(section.body)


def test_the_caption_tells_which_intervals_there_are(tmp_path):
    assert "of one seed, averages have none" in str(drawn(tmp_path / "one", grid(seeds=(0,))).body)
    assert "intervals of Student" in str(drawn(tmp_path / "three", grid()).body)


def test_the_page_tells_it_all(tmp_path):
    section = drawn(tmp_path, grid())
    text = re.sub("<[^>]*>", " ", str(section.body))
    for title in (
        "Methods", "Trade-offs", "Collaboration and conflict", "Merging against mixing", "Static and continual",
        "Rank correlations", "Lengths",
    ):  # fmt: skip
        assert title in text
    assert "continual" in text and "8.00" in text and "[" in text
    assert any("merged tsv minus mixture" in str(finding) for finding in section.findings)
    assert section.stats[0].label == "Best balance"
    page = write([tmp_path / "run"]).read_text()
    assert "Best balance" in page and "expert helpful" in page


def test_a_task_without_an_expert_is_shown_and_in_no_average(tmp_path):
    content = grid()
    rows = [row | {"task": "lengthy", "value": 0.0} for row in content["scores"] if row["task"] == "helpful"]
    content["scores"] += rows
    section = drawn(tmp_path, content)
    found = read(tmp_path / "run")
    merge = next(arm for arm in found.arms if arm.role == "merge")
    assert found.own == [*TASKS] and found.average(merge).value == pytest.approx(0.8167, abs=1e-3)
    assert "No expert was trained for lengthy" in str(section.body)
    assert merge.score("lengthy").low is not None  # all seeds agree, and items tell the interval


def test_one_seed_says_that_it_tells_nothing(tmp_path):
    section = drawn(tmp_path, grid(seeds=(0,)))
    assert any("of one seed, which cannot tell whether it is chance" in str(finding) for finding in section.findings)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"scores": 3}', '{"scores": [{"of": {}, "value": "x"}]}', '{"grid": 1, "scores": [], "chosen": 7}'],
)
def test_files_that_are_no_grid_are_passed_over(tmp_path, content):
    write_run(tmp_path / "run", job="grid", metrics={})
    (tmp_path / "run" / "grid.json").write_text(content)
    assert dimensions(load([tmp_path / "run"])) is None


def test_lower_is_turned_and_hostile_names_are_text(tmp_path):
    content = grid(seeds=(0,))
    for row in content["scores"]:
        row["arm"] = row["arm"].replace("mixture", "<script>alert(1)</script>")
        if row["task"] == "harmless":
            row |= {"better": "lower", "value": 1 - row["value"], "low": None, "high": None}
    section = drawn(tmp_path, content)
    assert "<script>" not in str(section.body)
    merge = next(arm for arm in read(tmp_path / "run").arms if arm.role == "merge")
    assert merge.scores[0]["harmless"] == pytest.approx(0.63)


def test_what_stands_beside_a_score_is_shown_with_it(tmp_path):
    from modicum.report.sections.beside import beside

    cells = [
        {"model": model, "task": "safe", "metric": "balanced", "value": 0.5, "beside": {"harmless <refused>": over}}
        for model, over in (("base", 0.125), ("meek", 1.0))
    ]
    write_run(tmp_path / "run", job="evaluate", metrics={"cells": [*cells, {"model": "x", "task": "y", "value": 1}]})
    text = str(beside(load([tmp_path / "run"])).body)
    assert "0.125" in text and "harmless &lt;refused&gt;" in text and "base" in text and ">x<" not in text
    write_run(tmp_path / "other", job="evaluate", metrics={"cells": [{"beside": 3}, 4]})
    assert beside(load([tmp_path / "other"])) is None
