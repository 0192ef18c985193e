"""The report's pictures of routed experts."""

from modicum.report import write
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
    metrics = {"routing_conflict": CONFLICT, "routing_bytes": BYTES, "router": ROUTER}
    write_run(tmp_path / "run", job="route", metrics=metrics)
    found = routing(load([tmp_path / "run"]))
    assert found is not None and "<a>" not in found.body and "&lt;a&gt;" in found.body
    for text in ("h.3", "chance", "kept apart", "1.25 kB", "4 kB", "31", "new"):
        assert text in found.body, text
    assert "1 of 4 layers" in found.findings[0] and "75" in found.findings[0]
    assert found.stats and "of 4 whole models" in found.stats[0].detail
    assert "Routed experts" in write([tmp_path / "run"]).read_text()
    assert "whole model" not in str(measurements(load([tmp_path / "run"])))


def test_a_run_without_a_router_still_shows_its_layers(tmp_path):
    write_run(tmp_path / "run", job="route", metrics={"routing_conflict": CONFLICT})
    found = routing(load([tmp_path / "run"]))
    assert found is not None and "h.0" in found.body
    write_run(tmp_path / "other", job="merge", metrics={})
    assert routing(load([tmp_path / "other"])) is None
