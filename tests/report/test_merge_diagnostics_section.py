"""The report's pictures of what a merge did."""

from pathlib import Path
from typing import Any

from modicum.report import write
from modicum.report.runs import load
from modicum.report.sections.merge_diagnostics import merge_diagnostics
from report_runs import write_run

NAMES = ["model.norm.weight", *(f"model.layers.{i}.{part}.weight" for i in range(3) for part in ("q<b>", "up", "ln"))]


def measured(survival: float = 0.99) -> dict[str, Any]:
    matrix = [not (name.endswith("ln.weight") or name == NAMES[0]) for name in NAMES]
    per_expert = {
        "spectra": [[4.0, 2.0, 1.0] if is_one else None for is_one in matrix],
        "energy_ranks": [2 if is_one else None for is_one in matrix],
        "outliers": [0.03] * len(NAMES),
        "ranks": [5 if is_one else None for is_one in matrix],
    }
    found: dict[str, Any] = {key: {"a": values, "b<c>": values} for key, values in per_expert.items()}
    found["interference"] = [1.5 if is_one else None for is_one in matrix]
    found["survival"] = [survival] * len(NAMES)
    return {"names": NAMES, **found}


def run_of(folder: Path, diagnostics: object) -> Path:
    return write_run(folder, "merge", metrics={"diagnostics": diagnostics})


def test_maps_show_the_tensors_that_were_measured(tmp_path: Path) -> None:
    found = merge_diagnostics(load([run_of(tmp_path / "run", measured())]))
    assert found is not None
    # Three layers: two matrices each where only matrices count, three tensors each for outliers and survival.
    assert found.body.count("<rect") == 2 * (6 + 6) + 6 + 2 * 9 + 9
    assert "How fast do the spectra fall?" in found.body
    assert "0.25" in found.body  # the last singular value beside the largest
    assert not found.findings
    page = write([tmp_path / "run"]).read_text()
    assert "What the merge did" in page
    assert "b<c>" not in page
    assert "q<b>" not in page


def test_losses_of_the_cast_are_a_finding(tmp_path: Path) -> None:
    found = merge_diagnostics(load([run_of(tmp_path / "run", measured(survival=0.5))]))
    assert found is not None
    assert "50.0% of the changed entries survive the cast" in found.findings[0]


def test_what_two_merges_have_in_common_is_drawn_once(tmp_path: Path) -> None:
    runs = [run_of(tmp_path / name, measured(share)) for name, share in (("one", 0.99), ("two", 0.98))]
    found = merge_diagnostics(load(runs))
    assert found is not None
    assert found.body.count("How fast do the spectra fall?") == 1
    assert found.body.count("What survives being stored?") == 2


def test_records_without_or_with_broken_diagnostics_draw_nothing(tmp_path: Path) -> None:
    broken: list[object] = [None, 3, {}, {"names": []}, {"names": NAMES}, {"names": NAMES, "survival": 3, "ranks": "x"}]
    for i, diagnostics in enumerate(broken):
        assert merge_diagnostics(load([run_of(tmp_path / str(i), diagnostics)])) is None
