"""Where the page is written, and what is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from modicum.errors import CheckpointError
from modicum.report import write
from report_runs import (
    write_run,
)


def test_the_report_lies_in_the_first_run_unless_told_otherwise(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, "train") for name in "ab")
    assert write([a, b]) == a / "report.html"
    assert write([a], tmp_path / "deep" / "er") == tmp_path / "deep" / "er" / "report.html"
    assert write([a], tmp_path / "x.html") == tmp_path / "x.html"
    assert not [path.name for path in tmp_path.rglob(".*")]


@pytest.mark.parametrize("make", ["nothing", "file", "empty"])
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, make: str) -> None:
    path = tmp_path / "run"
    if make == "file":
        path.write_text("")
    elif make == "empty":
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"^\S+run is not a (folder|run).*\.$"):
        write([path])
    assert list(tmp_path.rglob("*.html")) == []


def test_a_folder_of_runs_names_one(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", "train")
    with pytest.raises(CheckpointError, match=r"It holds runs, though: try .*runs/one\."):
        write([tmp_path / "runs"])


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "3"])
def test_a_broken_record_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", "train")
    (run / "record.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"record\.json is "):
        write([run])


def test_a_broken_recipe_is_refused_in_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", "train")
    (run / "recipe.yaml").write_text("a: [")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml cannot be read"):
        write([run])


def test_no_run_and_no_place_to_write_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no run to report on"):
        write([])
    run = write_run(tmp_path / "run", "train")
    with pytest.raises(CheckpointError, match="Cannot write .*Choose another --out"):
        write([run], run / "record.json" / "report.html")
