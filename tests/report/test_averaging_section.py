"""The report's part on averaged checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modicum.report import write
from modicum.report.runs import load
from modicum.report.sections.averaging import averaging, regimes
from report_runs import write_run

NAMES = [f"runs/a/checkpoint-{i}" for i in (1, 2, 3, 4)]


def metrics(**trace: Any) -> dict[str, Any]:
    rules = [
        {"name": "the choice", "coefficients": [0, 0.5, 0.5, 0], "loss": [1.0, 0.9, 1.1], "difference": [0, 0, 0]},
        {"name": "<last>", "coefficients": [0, 0, 0, 1], "loss": [1.25, 1.2, 1.3], "difference": [0.25, 0.2, 0.3]},
        {"name": "uniform", "coefficients": [0.25] * 4, "loss": [1.4, None, None], "difference": [0.4, None, None]},
    ]
    return {
        "coefficients": dict(zip(NAMES, [0, 0.5, 0.5, 0])),
        "averaging": {
            "method": "sewa",
            "measured_on": "held_out",
            "single": [1.5, 1.4, 1.3, 1.25],
            "rules": rules,
            "curve": {"last": 2, "loss": [1.3, 1.0, 1.2]},
            "trace": trace,
        },
    }


def test_choice_rules_and_curves_are_shown(tmp_path: Path) -> None:
    told = metrics(logits=[-1, 2, 1, 0], curve=[1.3, 1.0, 1.1, 1.2], surrogate=[[1, 1.3], [2, 1.01]])
    write_run(tmp_path / "run", job="average", metrics=told)
    found = averaging(load([tmp_path / "run"]))
    assert found is not None
    shown = ["checkpoint-2", "Loss alone", "Logit", "&lt;last&gt;", "+0.25", " ± 0.05", "held-out data", "mean of 2"]
    for text in [*shown, "Loss by number of checkpoints", "evaluated", "surrogate", "Loss along the run"]:
        assert text in found.body, text
    assert "<last>" not in found.body
    assert "checkpoint-2 and checkpoint-3" in found.findings[0]
    assert "is worse than the choice by 0.25" in found.findings[1]
    assert "Averaged checkpoints" in write([tmp_path / "run"]).read_text()


def test_windows_and_a_break_between_regimes(tmp_path: Path) -> None:
    losses = {(0, 1): 1.0, (1, 1): 1.1, (2, 1): 0.9, (3, 1): 0.8, (0, 2): 0.95, (1, 2): 3.0, (2, 2): 0.7}
    told = metrics(windows=[[start, length, loss] for (start, length), loss in losses.items()])
    write_run(tmp_path / "run", job="average", metrics=told)
    view = load([tmp_path / "run"])
    assert regimes(view) == [1]
    found = averaging(view)
    assert found is not None and "by start and length" in found.body
    assert "break after checkpoint-2" in found.findings[2]


def test_what_other_rules_found_is_read_and_estimates_are_called_so(tmp_path: Path) -> None:
    told = metrics(logits=[-1, 2, 1, 0])
    windows = [[0, 1, 1.0], [1, 1, 1.1], [2, 1, 0.9], [3, 1, 0.8], [0, 2, 0.95], [1, 2, 3.0], [2, 2, 0.7]]
    tried = [[[0, 0.5, 0.5, 0], 1.0625, 1.125]]
    told["averaging"]["rules"][1]["trace"] = {"windows": windows, "surrogate": [[1, 1.3], [2, 1.0]], "tried": tried}
    told["averaging"]["measured_on"] = "held_out and data"
    write_run(tmp_path / "run", job="average", metrics=told)
    view = load([tmp_path / "run"])
    found = averaging(view)
    assert found is not None and regimes(view) == [1]
    for text in ("Estimate by the surrogate of the loss", "checkpoint-2 and checkpoint-3", "1.062", "1.125",
                 "some rows were searched too"):  # fmt: skip
        assert text in found.body, text


def test_what_greedy_did_and_a_plain_average(tmp_path: Path) -> None:
    told = metrics(greedy=[{"checkpoint": 3, "loss": 1.2, "kept": True}, {"checkpoint": 0, "loss": 1.5, "kept": False}])
    write_run(tmp_path / "greedy", job="average", metrics=told)
    write_run(tmp_path / "plain", job="average", metrics={"coefficients": dict(zip(NAMES, [0.25] * 4))})
    write_run(tmp_path / "other", job="merge")
    found = averaging(load([tmp_path / "greedy", tmp_path / "plain"]))
    assert found is not None and "left out" in found.body and "<h3>plain</h3>" in found.body
    assert averaging(load([tmp_path / "other"])) is None
