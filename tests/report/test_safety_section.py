import json

import pytest

from modicum.report.runs import load
from modicum.report.sections.safety import safety
from report_runs import write_run


def estimate(value, n=16):
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n}


def cell(target, suite, success, refused, curve=(0.5, 0.25)):
    return {
        "target": target, "suite": suite, "greedy": estimate(success), "over_refusal": estimate(refused),
        "malformed": 0.1, "unparsed": 0.0, "draws": 2.5, "prompts": 16, "corrected": {"value": success / 2},
        "ns": [1, 2], "asr_all": [estimate(value) for value in curve],
    }  # fmt: skip


def metrics(**more):
    cells = [cell("base", "plain", 0.1, 0.0), cell("base", "flip", 0.9, 0.0), cell("srg", "flip", 0.2, 0.7, (0.2, 0.1))]
    targets = {
        "base": {"families": 1, "asr": 0.9, "over_refusal": 0.0, "malformed": 0.1},
        "srg": {"families": 1, "asr": 0.2, "over_refusal": 0.7, "malformed": 0.1},
    }
    judge = {
        "judge": "linear", "approximate": False, "fpr": estimate(0.2), "fnr": estimate(0.17), "auroc": 0.89,
        "positives": 449, "negatives": 503, "refusal": {"judge": "prefix", "approximate": True},
    }  # fmt: skip
    return {"safety": {"cells": cells, "targets": targets, "judge": judge} | more}


def drawn(tmp_path, content):
    write_run(tmp_path / "run", job="attack", metrics=content)
    return safety(load([tmp_path / "run"]))


def test_attack_success_never_stands_alone(tmp_path):
    section = drawn(tmp_path, metrics())
    for finding in map(str, section.findings):
        assert "harmful requests in wrappers" in finding and "refuses" in finding
    assert "<b>srg</b> answers 20.0% of" in str(section.findings[1]) and "refuses 70.0%" in str(section.findings[1])
    assert section.stats[0].value == "90.0%" and "0.0% of harmless" in section.stats[0].detail
    text = str(section.body)
    assert text.count("harmless requests refused") >= 2 and "attack success" in text


def test_answers_are_told_by_three_outcomes(tmp_path):
    """Answered, declined, malformed: an answer that is not harmful may be no refusal. Older records lack the second."""
    content = metrics()
    assert "harmful requests refused" not in str(drawn(tmp_path, content).body)
    for number, cells in enumerate(content["safety"]["cells"]):
        cells["refused"] = estimate(0.25 + 0.5 * (number == 2))
    content["safety"]["targets"]["srg"] |= {"refused": 0.75}
    section = drawn(tmp_path / "newer", content)
    text = str(section.body)
    assert "harmful requests refused" in text and "Harmful refused" in text and "75.0% [65.0% – 85.0%]" in text
    assert "answers 20.0% of the harmful requests in wrappers, declines 75.0% of them, and" in str(section.findings[1])


def test_curves_leave_out_the_family_that_training_saw(tmp_path):
    text = str(drawn(tmp_path, metrics()).body)
    assert "all N samples unsafe" in text and ">srg<" in text and "25.0%" in text
    assert "not measured" in text and "approximate: goes by words" in text and "952" in text


def test_synthesis_counts(tmp_path):
    found = {"synthesis": {"generated": 24, "kept": {"illegal": 4, "helpful": 6}, "dropped": {"finish": 14}}}
    text = str(drawn(tmp_path, found).body)
    assert "dropped: finish" in text and "14" in text and "24" in text


@pytest.mark.parametrize("content", [{}, {"safety": 3}, {"synthesis": []}])
def test_runs_without_safety_have_no_section(tmp_path, content):
    assert drawn(tmp_path, content) is None


def test_names_are_escaped(tmp_path):
    content = json.loads(json.dumps(metrics()).replace('"srg"', '"<script>x</script>"'))
    section = drawn(tmp_path, content)
    assert "<script>x" not in str(section.body) + str(section.findings)


def test_models_that_all_refuse_everything_or_nothing_have_a_picture_too(tmp_path):
    for value in (0.0, 1.0):
        content = metrics()
        for summary in content["safety"]["targets"].values():
            summary |= {"asr": value, "over_refusal": value}
        for one in content["safety"]["cells"]:
            one["asr_all"] = [estimate(value), estimate(value)]
        assert "attack success in wrappers" in str(drawn(tmp_path / str(value), content).body)
