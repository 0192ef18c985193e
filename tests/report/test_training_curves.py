"""Losses that are odd are drawn, and said."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from modicum.report import write
from report_runs import (
    training_log,
    write_run,
)
from test_report import read


def test_a_loss_that_is_no_number_is_told_and_breaks_the_line(tmp_path: Path) -> None:
    log = training_log(10, 2.0, 1.0)
    for line in log:
        if line["event"] == "train" and line["step"] in (5, 6):
            line["loss"] = math.nan
    outline, text = read(write([write_run(tmp_path / "run", "train", log=log)]))
    assert "run broke: its loss is not a number in 2 of 10 logged steps, first at step 5." in text
    path = next(attrs["d"] for tag, attrs in outline.tags if tag == "path" and attrs.get("class") == "solid c0")
    assert path is not None and path.count("M") == 2 and path.count("L") == 6


@pytest.mark.parametrize(
    "losses", [[1.5], [1.5, 1.5], [0.0, 0.0], [math.nan], [math.inf, 2.0], [1e-30, 1e30], [-1e308, 1e308], [10**400]]
)
def test_odd_losses_still_draw(tmp_path: Path, losses: list[float]) -> None:
    log = [{"event": "train", "step": i, "loss": loss} for i, loss in enumerate(losses)]
    page = write([write_run(tmp_path / "run", "train", log=log)]).read_text()
    assert not re.search(r'(d|style|x1|y1)="[^"]*(nan|inf)', page)
