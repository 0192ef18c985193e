"""The report's pictures of gradient clipping."""

import json

from modicum.report import write
from modicum.report.runs import load
from modicum.report.sections.clipping import clipping
from report_runs import training_log, write_run


def run_with_log(folder, tensors=3, steps=30):
    lines = [{"names": [f"layer.{i}.<weight>" for i in range(tensors)], "every": 1}]
    for step in range(1, steps + 1):
        factor = [1.0 if i else 0.5 for i in range(tensors)]
        lines.append({"step": step, "norm": [2.0] * tensors, "threshold": [None] * tensors, "factor": factor})
    lines.append({"step": steps, "steps": steps, "clip_rate": [0.0 if i else 0.9 for i in range(tensors)]})
    (folder / "clipping.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return folder


def made(tmp_path, spike=None):
    folder = tmp_path / "run"
    write_run(folder, job="train", log=training_log(60, 4.0, 2.0, spike=spike))
    return folder


def test_the_heat_map_names_the_tensor_that_was_clipped_most(tmp_path):
    folder = run_with_log(made(tmp_path))
    found = clipping(load([folder]))
    assert found is not None and "layer.0.&lt;weight&gt;, in 90 %" in found.findings[0]
    assert found.body.count("<rect") == 3 * 30
    assert "spike" in found.body
    page = write([folder]).read_text()
    assert "Gradient clipping" in page and "layer.0.<weight>" not in page


def test_spikes_of_the_loss_are_marked(tmp_path):
    calm = clipping(load([run_with_log(made(tmp_path / "calm"))]))
    hit = clipping(load([run_with_log(made(tmp_path / "hit", spike=45))]))
    assert "0 spikes: logged losses" in calm.body and "1 spike: logged losses" in hit.body
    # A dot is a line of no length.
    assert hit.body.count("h0") == 1 and "h0" not in calm.body


def test_a_large_model_shows_its_most_clipped_tensors(tmp_path):
    found = clipping(load([run_with_log(made(tmp_path), tensors=100, steps=200)]))
    assert found is not None and found.body.count("<rect") == 40 * 60
    assert "40 most strongly clipped of 100 tensors" in found.body


def test_without_a_log_or_with_a_broken_one_there_is_no_section(tmp_path):
    folder = made(tmp_path)
    assert clipping(load([folder])) is None
    (folder / "clipping.jsonl").write_text('{"names": ["a"]}\n{"step": 1, "factor": 3}\n{"step": "x"}\n{"st')
    assert clipping(load([folder])) is None
