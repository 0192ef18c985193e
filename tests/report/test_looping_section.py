"""The report's tables of looped models."""

from modicum.report import write
from modicum.report.runs import load
from modicum.report.sections.looping import looping
from report_runs import write_run

SPENT = {"tokens": 9, "mean_cycles": 1.5, "visits": 30, "visits_saved": 0.42, "seconds": 1.0, "time_saved": 0.31}
POINT = {"threshold": 0.9, "mean_cycles": 1.25, "loss": 2.5, "full_loss": 2.4875, "visits": 6.5}
VISIT = {"layer": 3, "cycle": 1, "zero_attention": None, "loss_increase": -0.02}


def test_what_was_saved_compared_and_measured_stands_in_the_report(tmp_path):
    cells = [{"model": "<a>", "task": "code", "metric": "bits_per_byte", "value": 1.0, "spent": SPENT}]
    write_run(tmp_path / "scores", job="evaluate", metrics={"cells": cells})
    metrics = {"criteria": {"confidence": POINT}, "importance": {"visits": [VISIT], "rank_correlation": None}}
    write_run(tmp_path / "exits", job="calibrate", metrics=metrics)
    found = looping(load([tmp_path / "scores", tmp_path / "exits"]))
    assert "&lt;a&gt;" in found.body and "<a>" not in found.body
    for text in ("42 %", "31 %", "confidence", "1.25", "6.5", "-0.02"):
        assert text in found.body.replace("−", "-"), text
    assert "Looped models" in write([tmp_path / "exits"]).read_text()


def test_runs_without_a_looped_model_have_no_section(tmp_path):
    write_run(tmp_path / "r", job="evaluate", metrics={"cells": [], "criteria": {"x": 3}, "importance": {"visits": 7}})
    write_run(
        tmp_path / "s", job="train", metrics={"criteria": {"x": {"mean_cycles": "<b>"}}, "importance": {"visits": 7}}
    )
    assert looping(load([tmp_path / "r"])).body.count("<tr>") == 1
    assert "<b>" not in looping(load([tmp_path / "s"])).body
