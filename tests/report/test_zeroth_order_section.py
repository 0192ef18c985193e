"""The report's pictures of zeroth-order training."""

import math

import pytest

from modicum.jobs import execute
from modicum.recipe import parse
from modicum.record import read_log
from modicum.report import write
from modicum.report.runs import load
from modicum.report.sections.measurements import measurements
from modicum.report.sections.zeroth_order import zeroth_order
from report_runs import training_log, write_run

COSTS = {
    "model_bytes": 540e6, "weight_bytes": 50e6, "factor_bytes": 3e6, "state_bytes": 7e3, "forwards_per_step": 2,
    "weight_passes_per_step": 0, "draws_per_step": 960, "coordinates": 960, "parameters": 13_271_040,
}  # fmt: skip


def log(steps=20, **changes):
    return [
        {"event": "train", "step": i, "loss": math.exp(-i / 9), "forwards": 2 * i, "seconds": 0.5 * i} | changes
        for i in range(1, steps + 1)
    ]


def test_loss_is_drawn_against_evaluations_and_time_beside_the_costs(tmp_path):
    write_run(tmp_path / "tezo", job="train", log=log(), metrics={"zeroth_order": COSTS})
    write_run(tmp_path / "<mezo>", job="train", log=log(forwards=9))
    found = zeroth_order(load([tmp_path / "tezo", tmp_path / "<mezo>"]))
    assert found is not None and "<mezo>" not in found.body and "&lt;mezo&gt;" in found.body
    assert found.body.count("Training loss by ") == 2
    for text in ("540 MB", "150 MB", "3 MB", "7 kB", "13,271,040", "960"):
        assert f">{text}<" in found.body, text
    assert len(found.findings) == 1 and "40 loss evaluations in 10.0 s, keeping 3.01 MB" in found.findings[0]
    assert "Zeroth-order training" in write([tmp_path / "tezo"]).read_text()
    assert "draws per step" not in str(measurements(load([tmp_path / "tezo"])))


def test_a_run_that_did_not_end_shows_its_curve_alone(tmp_path):
    write_run(tmp_path / "run", job="train", status="running", log=log(loss=math.nan))
    found = zeroth_order(load([tmp_path / "run"]))
    assert found is not None and "Memory by part" not in found.body and not found.findings


def test_ordinary_training_has_no_such_section(tmp_path):
    write_run(tmp_path / "run", job="train", log=training_log(60, 4.0, 2.0))
    assert zeroth_order(load([tmp_path / "run"])) is None


@pytest.mark.parametrize("optimizer", [{"name": "tezo", "rank": 2, "engine": "adapter"}, {"name": "mezo"}])
def test_what_a_run_records_is_what_the_section_reads(tiny_model, tmp_path, optimizer):
    trainer = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2}
    data = {"path": "task:parity", "size": 8}
    recipe = {"job": "train", "model": str(tiny_model), "data": data, "optimizer": {"lr": 1e-3, **optimizer}}
    run = execute(parse(recipe | {"trainer": trainer}), tmp_path / "run", quiet=True)
    lines = read_log(run.folder, "train")
    assert [line["forwards"] for line in lines] == [8, 16] and 0 < lines[0]["seconds"] < lines[1]["seconds"]
    costs = run.record["metrics"]["zeroth_order"]
    assert costs["model_bytes"] == costs["weight_bytes"] == 4 * costs["parameters"]
    assert (costs["factor_bytes"] > 0) == (optimizer["name"] == "tezo")
    found = zeroth_order(load([run.folder]))
    assert found is not None and "16 loss evaluations" in found.findings[0]
