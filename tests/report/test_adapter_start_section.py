"""The report's pictures of adapter initialisations."""

import json

import pytest

from modicum.report import write
from modicum.report.runs import load
from modicum.report.sections.adapter_start import adapter_start
from report_runs import training_log, write_run

MODULES = [f"model.layers.{layer}.self_attn.{kind}_proj" for layer in range(3) for kind in "qv"]


def made(tmp_path, **geometry):
    folder = write_run(tmp_path / "run", job="train", log=training_log(60, 4.0, 2.0))
    (folder / "adapter").mkdir()
    content = {"name": "hrp", "modules": MODULES, "turned_A": [30.0] * 6, "turned_B": [None] * 6} | geometry
    (folder / "adapter" / "adapter_geometry.json").write_text(json.dumps(content))
    return folder


def test_angles_and_spectrum_are_drawn_and_told(tmp_path):
    shares = {"least": [0.2, 0.5, 1.0], "median": [0.5, 0.8, 1.0], "most": [0.9, 1.0, 1.0]}
    folder = made(tmp_path, held=[0.8] * 5 + [None], shares=shares)
    found = adapter_start(load([folder]))
    assert found is not None
    assert found.findings == (
        "<b>run</b>, started by hrp: its input directions (A) turned by 30° on average; "
        "its rank held 80 % of the preheated change.",
    )
    assert found.body.count("<rect") == 6 and found.body.count("<figure") == 2
    assert "median of the modules" in found.body
    page = write([folder]).read_text()
    assert "Adapter start" in page and "Training" in page


def test_angles_to_a_full_fine_tune_are_drawn_and_told(tmp_path):
    beside = {"start_A": [80.0] * 6, "end_A": [60.0] * 5 + [None], "start_B": [None] * 6, "end_B": [50.0] * 6}
    found = adapter_start(load([made(tmp_path, **beside)]))
    assert found is not None and found.body.count("<figure") == 4
    [told] = found.findings
    assert "(A) lay 80° before and 60° after training from those of the full fine-tune" in told
    assert "(B) lay 50° after training from" in told


def test_names_are_escaped_and_what_is_missing_is_left_out(tmp_path):
    found = adapter_start(load([made(tmp_path, modules=["model.layers.0.<x>"], turned_A=[1.0], turned_B=[2.0])]))
    assert found is not None and "<x>" not in found.body and "&lt;x&gt;" in found.body
    folder = made(tmp_path / "other", name="<i>", turned_B=[None, 10.0, None, 20.0, None, None])
    found = adapter_start(load([folder]))
    assert found is not None and "&lt;i&gt;" in found.findings[0] and "(B) turned by 15°" in found.findings[0]


@pytest.mark.parametrize("text", ["", "[]", '{"modules": 3}', '{"modules": ["a"], "turned_A": "x", "shares": [1]}'])
def test_without_a_geometry_or_with_a_broken_one_there_is_no_section(tmp_path, text):
    folder = made(tmp_path)
    (folder / "adapter" / "adapter_geometry.json").write_text(text)
    assert adapter_start(load([folder])) is None
    (folder / "adapter" / "adapter_geometry.json").unlink()
    assert adapter_start(load([folder])) is None
