"""The report's pictures of routed experts."""

import json

import pytest

from modicum.report import write
from modicum.report.route_points import route_points
from modicum.report.runs import load
from modicum.report.sections.measurements import measurements
from modicum.report.sections.routing import routing
from report_runs import write_run

CONFLICT = {"layers": [f"h.{i}" for i in range(4)], "values": [0.6, 0.5, 0.4, 0.3], "routed": ["h.0"], "chance": 0.5}
BYTES = {
    "experts": 4, "whole_model": 1000, "dense": 1000, "stored": 250, "share": 0.3125, "store": "sign",
    "by_store": {"sign": 250, "whole": 4000},
}  # fmt: skip
ROUTER = {
    "accuracy": 0.75,
    "confusion": {"names": ["<a>", "b"], "counts": [[3, 1], [0, 0]]},
    "uncertainty": [
        {"task": "<a>", "known": True, "counts": [3, 1], "mean": 0.1, "gated": 0.0},
        {"task": "new", "known": False, "counts": [0, 2], "mean": 0.9, "gated": None},
    ],
}


def test_conflict_bytes_confusion_and_doubt(tmp_path):
    distilled = {"<a>": {"before": 0.25, "after": 0.125}}
    metrics = {"routing_conflict": CONFLICT, "routing_bytes": BYTES, "router": ROUTER, "distilled": distilled}
    write_run(tmp_path / "run", job="route", metrics=metrics)
    found = routing(load([tmp_path / "run"]))
    assert found is not None and "<a>" not in found.body and "&lt;a&gt;" in found.body
    for text in ("h.3", "chance", "kept apart", "1.25 kB", "4 kB", "31", "new", "0.250", "0.125"):
        assert text in found.body, text
    assert "1 of 4 layers" in found.findings[0] and "75" in found.findings[0]
    assert found.stats and "of 4 whole models" in found.stats[0].detail
    assert "Routed experts" in write([tmp_path / "run"]).read_text()
    told = str(measurements(load([tmp_path / "run"])))
    assert "whole model" not in told and "distilled" not in told


def test_a_run_without_a_router_still_shows_its_layers(tmp_path):
    write_run(tmp_path / "run", job="route", metrics={"routing_conflict": CONFLICT})
    found = routing(load([tmp_path / "run"]))
    assert found is not None and "h.0" in found.body
    write_run(tmp_path / "other", job="merge", metrics={})
    assert routing(load([tmp_path / "other"])) is None


def routed_stage(folder, store, share, routed):
    conflict = {**CONFLICT, "routed": [f"h.{i}" for i in range(routed)]}
    metrics = {"routing_conflict": conflict, "routing_bytes": {**BYTES, "store": store, "share": share}}
    write_run(folder, job="route", metrics=metrics)


def cell(model, task, value, **more):
    row = {"model": model, "task": task, "metric": "exact_match", "value": value, "low": 0.0, "high": 1.0, "n": 4}
    return row | {"better": "higher", "unit": "share"} | more


def pipeline(folder):
    """Two stores, a merge, and an evaluation that also asks what no expert knows."""
    tasks = {"adding": {"data": {"path": "known"}}, "counting": {"data": "new"}}
    models = {"one bit": "stage:sign", "uniform": "stage:sign/uniform", "all": "stage:whole", "ties": "stage:ties"}
    models |= {"base": "builtin:base", "expert": "stage:expert"}
    stages = [
        {"name": "expert", "job": "train"},
        {"name": "sign", "job": "route", "unknown": {"counting": {"path": "new"}}},
        {"name": "whole", "job": "route"},
        {"name": "ties", "job": "merge"},
        {"name": "scores", "job": "evaluate", "models": models, "tasks": tasks},
    ]
    write_run(folder, job="pipeline", recipe={"stages": stages}, stages=[])
    routed_stage(folder / "stages/sign", "sign", 0.3, 2)
    routed_stage(folder / "stages/whole", "whole", 1.25, 4)
    write_run(folder / "stages/ties", job="merge", metrics={"layers": 1})
    write_run(folder / "stages/expert", job="train", metrics={"loss": 1.0})
    values = dict(zip(models, (0.8, 0.4, 0.9, 0.5, 0.1, 0.2)))
    cells = [cell(model, task, v if task == "adding" else 0.0) for model, v in values.items() for task in tasks]
    write_run(folder / "stages/scores", job="evaluate", metrics={"cells": cells})


def test_quality_over_bytes_of_all_stores(tmp_path):
    pipeline(tmp_path / "run")
    points = {
        p.model: (p.cost.kind, p.cost.share, p.cost.routed, p.quality) for p in route_points(load([tmp_path / "run"]))
    }
    assert points == {
        "one bit": ("sign", 0.3, 2, 0.8),
        "uniform": ("sign", 0.3, 2, 0.4),
        "all": ("whole", 1.25, 4, 0.9),
        "ties": ("merge", 0.25, 0, 0.5),
    }
    found = routing(load([tmp_path / "run"])).body
    assert "exact match, %, mean of the known tasks" in found and "exact match over bytes of 4 models" in found
    # Of two runs side by side, stages of one name are told apart by where they lie.
    pipeline(tmp_path / "other")
    assert len(route_points(load([tmp_path / "run", tmp_path / "other"]))) == 8


def test_quality_over_bytes_of_a_grid_by_arm(tmp_path):
    rows = []
    for seed in (0, 1):
        of = {"cell": f"routed-{seed}", "stage": "routed", "role": None, "axes": {"seed": seed}}
        for task, value in (("adding", 0.5 + 0.1 * seed), ("sorting", 0.7)):
            rows.append(cell("m", task, value, arm="routed sign", of=of, stage="test", axes={"seed": seed}))
    write_run(tmp_path / "grid", job="grid", stages=[{"name": f"r{s}", "folder": f"stages/routed-{s}"} for s in (0, 1)])
    for seed in (0, 1):
        routed_stage(tmp_path / f"grid/stages/routed-{seed}", "sign", 0.3 + 0.01 * seed, 3)
    (tmp_path / "grid" / "grid.json").write_text(json.dumps({"grid": 1, "cells": [], "scores": rows}))
    found = route_points(load([tmp_path / "grid"]))
    assert [(p.model, p.cost.share, p.tasks) for p in found] == [("routed sign", 0.3, 2), ("routed sign", 0.31, 2)]
    assert [p.quality for p in found] == pytest.approx([0.6, 0.65])


@pytest.mark.parametrize("text", ["", "[]", '{"scores": 3}', '{"scores": [3, {"of": 1}]}'])
def test_a_grid_that_tells_no_scores_has_no_points(tmp_path, text):
    write_run(tmp_path / "grid", job="grid", stages=[{"name": "r", "folder": "stages/routed"}])
    routed_stage(tmp_path / "grid/stages/routed", "sign", 0.3, 3)
    (tmp_path / "grid" / "grid.json").write_text(text)
    assert route_points(load([tmp_path / "grid"])) == []
