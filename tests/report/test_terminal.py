"""The table and the summary in a terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from modicum.errors import CheckpointError
from modicum.report import print_summary, terminal_table
from report_runs import (
    MODELS,
    cells,
    quickstart,
)


def render(table: object) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system="standard")
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_terminal_table_shows_every_model_with_intervals_and_the_best_in_bold() -> None:
    text = render(terminal_table({"metrics": {"cells": cells()}}))
    assert set(re.findall(r"\x1b\[1m *([\d.]+%)", text)) == {"91.2%", "86.0%", "78.1%", "74.2%"}
    assert all(model in text for model in MODELS)
    assert "± 2.5%" in text and "worst task" in text


def test_the_terminal_table_of_a_pipeline_is_that_of_its_stages() -> None:
    assert "91.2%" in render(terminal_table({"metrics": {"scores": {"cells": cells()}, "train": {"loss": 1.0}}}))


def test_markup_in_a_models_name_stays_text() -> None:
    rows = [{"model": "[red]x[/red]", "task": "[bold]", "metric": "accuracy", "value": 1.0}]
    text = render(terminal_table({"metrics": {"cells": rows}}))
    assert "[red]x[/red]" in text and "[bold]" in text


def test_a_record_without_results_has_no_table() -> None:
    with pytest.raises(CheckpointError, match="no evaluation results"):
        terminal_table({"metrics": {}})


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_a_narrow_window_takes_no_column_away(columns, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_summary(quickstart(tmp_path / "q"))
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"{model} ") for line in lines) for model in MODELS)
    assert sum("78.1%" in line for line in lines) and not any("…" in line for line in lines)


def test_the_summary_names_what_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(quickstart(tmp_path / "q"))
    text = capsys.readouterr().out
    assert "91.2%" in text and "4 min 36 s" in text
    assert f"ties/model  {tmp_path / 'q' / 'stages' / 'ties' / 'model'}" in text.replace("\n", "")
