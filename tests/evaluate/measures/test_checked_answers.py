"""Instructions that a program checks, and questions that may have no answer: outcomes, scores, refusals."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from modicum.errors import ModicumError, RecipeError
from modicum.evaluate.checks import CHECKS, kept, read
from modicum.evaluate.dimensions import declining
from modicum.evaluate.intervals import ratio_difference
from modicum.evaluate.measures.decline import decline, outcome
from modicum.evaluate.measures.instructions import instructions
from modicum.evaluate.rows import Rows
from modicum.jobs import execute
from modicum.jobs.data.made.unanswerable import unanswerable
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.recipe import parse
from modicum.record import read_record
from modicum.registry import measure, row_kind


def told(*texts):
    return SimpleNamespace(generate=lambda *_, **__: list(texts))


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        ({"kind": "words", "count": 3}, "one two three.", "one two"),
        ({"kind": "at_most_words", "count": 2}, "one", "one two three"),
        ({"kind": "at_least_words", "count": 2}, "one two three", "one"),
        ({"kind": "lower_case"}, "all small.", "Not all"),
        ({"kind": "upper_case"}, "ALL 3!", "ALL bUT"),
        ({"kind": "with", "text": "Sea"}, "the sea", "the lake"),
        ({"kind": "without", "text": ","}, "a and b", "a, b"),
        ({"kind": "begins_with", "text": "Dear Ada"}, '"Dear Ada, hello', "Oh Dear Ada"),
        ({"kind": "ends_with", "text": "river"}, "by the river.", "the river again"),
        ({"kind": "json"}, "[1, 2]", "1, 2"),
        ({"kind": "json", "keys": ["a"]}, '```json\n{"a": 1}\n```', '{"a": 1, "b": 2}'),
        ({"kind": "sentences", "count": 2}, "One is 1.5. Two!", "One."),
        ({"kind": "mentions", "text": "cat", "count": 2}, "A cat, a Cat.", "cats and a cat"),
        ({"kind": "lines", "count": 2, "prefix": "-"}, "- a\n\n- b", "- a\nb"),
        ({"kind": "lines", "count": 1}, "a", "a\nb"),
    ],
)
def test_what_keeps_an_instruction(check, good, bad):
    assert kept(check, f" {good}\n") and not kept(check, bad) and not kept(check, " ")


def test_every_check_is_tried():
    tried = {check["kind"] for check, *_ in test_what_keeps_an_instruction.pytestmark[0].args[1]}
    assert tried == {*CHECKS}


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ({"kind": "word", "count": 3}, "there is no check 'word'. Did you mean 'words'"),
        ("words", "there is no check 'words'"),
        ({"kind": "words"}, "count is None, expected int"),
        ({"kind": "words", "count": True}, "count is True, expected int"),
        ({"kind": "with", "text": ""}, "text is '', expected str"),
        ({"kind": "words", "counts": 3}, "has no 'counts'. Did you mean 'count'"),
    ],
)
def test_checks_that_are_none_are_refused_with_their_row(check, message):
    with pytest.raises(RecipeError, match=message):
        read(check)
    with pytest.raises(RecipeError, match=f"f, row 4: .*{message}"):
        row_kind["instruction"].function(DataSection(path="f"), {"prompt": "q", "checks": [check]}, 4)


def test_answers_keep_all_their_instructions_or_do_not():
    checks = [{"kind": "words", "count": 2}, {"kind": "lower_case"}]
    rows = Rows("instruction", [{"prompt": "p", "checks": checks}] * 2)
    items = instructions(rows, told("two words", "Two words"))
    assert [item["correct"] for item in items] == [True, False]
    facts = measure["instructions"].facts
    assert facts.details(items) == {
        "beside": {"single instructions kept": 0.75}, "kinds": {"lower_case": 0.5, "words": 1.0}, "single": 0.75,
        "words": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("Ada's city is Oslo.", ["Lima", "Oslo"], "right"),
        ("the flute", ["The flute."], "right"),
        ("Oslofjord", ["Oslo"], "wrong"),
        ("Ada's city is Lima.", [], "wrong"),
        ("I don't know, maybe Oslo.", ["Oslo"], "declined"),
        ("The record does not mention it.", ["Oslo"], "declined"),
        ("Unknown.", [], "declined"),
        ("It isn't specified in the record.", [], "declined"),
        ("This can't be determined.", [], "declined"),
        ("There is not enough information.", [], "declined"),
        ("I do not know.", [], "declined"),
        ("Ada knows Oslo.", ["Oslo"], "right"),
        ("I don't have any information about that.", [], "declined"),
        ("Emil does not have a pet.", [], "wrong"),
        ("…", ["Oslo"], "unparsed"),
        ("pass", [], "wrong"),
    ],
)
def test_outcomes(text, answers, expected):
    assert outcome(text, answers) == expected


def test_own_phrases_of_declining():
    assert outcome("Pass!", [], declines=[r"^pass\b"]) == "declined"
    with pytest.raises(RecipeError, match="declines .* is no regular expression"):
        parse({"job": "evaluate", "model": "x", "tasks": {"a": {"kind": "decline", "data": "y", "declines": ["("]}}})


def test_the_scores_of_declining_are_those_of_the_counts():  # H14
    rows = Rows("question", [{"prompt": "p", "answers": ["yes"]}] * 100 + [{"prompt": "p", "answers": []}] * 100)
    texts = ["yes"] * 60 + ["no"] * 20 + ["unknown"] * 20 + ["unknown"] * 70 + ["yes"] * 30
    items = decline(rows, told(*texts))
    facts = measure["decline"].facts
    found = facts.details(items)
    assert {k: found[k] for k in ("f1", "false_confidence", "over_refusal", "truthful")} == {
        "f1": 0.736842, "false_confidence": 0.3, "over_refusal": 0.2, "truthful": 0.75,
    }  # fmt: skip
    for metric, value in (("f1", 0.7368421), ("truthful", 0.75), ("right", 0.65)):
        estimate = facts.estimate(items, level=0.95, metric=metric)
        assert estimate.value == pytest.approx(value) and estimate.low < value < estimate.high
        assert facts.difference(items, items, level=0.95, metric=metric).value == 0
    assert declining(**found["counts"]).f1 == pytest.approx(0.7368421)


def test_unread_answers_are_counted_apart():
    rows = Rows("question", [{"prompt": "p", "answers": ["yes"]}, {"prompt": "p", "answers": []}] * 2)
    items = decline(rows, told("yes", "unknown", "", "..."))
    facts = measure["decline"].facts
    assert facts.details(items)["unparsed"] == {"answerable": 1, "unanswerable": 1}
    assert facts.estimate(items, level=0.9, metric="f1").value == 1.0
    assert facts.estimate(items, level=0.9, metric="right").value == 0.5
    never = decline(rows, told("yes", "yes", "yes", "yes"))
    assert (
        facts.estimate(never, level=0.9, metric="f1").value == 0.0 < facts.estimate(never, level=0.9, metric="f1").high
    )
    same = facts.difference(never, never, level=0.9, metric="f1")
    assert same.value == 0 and same.low < 0 < same.high
    nothing = decline(rows, told("", "", "", ""))
    assert facts.estimate(nothing, level=0.9, metric="f1")[:3] == (0.0, None, None)
    assert "f1" not in facts.details(nothing)


def test_a_difference_of_ratios_by_resampling():
    import numpy as np

    rng = np.random.default_rng(0)
    shared = rng.random(400)
    a = [(float(s < 0.6), 1.0) for s in shared]
    b = [(float(s < 0.5), 1.0 + (i % 2)) for i, s in enumerate(shared)]
    found = ratio_difference(a, b)
    draws = [np.array([a, b])[:, rng.integers(400, size=400)].sum(1) for _ in range(2000)]
    values = [x[0][0] / x[0][1] - x[1][0] / x[1][1] for x in draws]
    assert np.quantile(values, [0.025, 0.975]) == pytest.approx([found.low, found.high], abs=0.01)
    with pytest.raises(RecipeError, match="positive denominators"):
        ratio_difference([(0.0, 0.0)], [(1.0, 1.0)])


@pytest.mark.parametrize(
    ("answers", "expected"),
    [("Oslo", ["Oslo"]), (["a", "b"], ["a", "b"]), ({"text": ["x"]}, ["x"]), ({"text": []}, []), (None, []), ([], [])],
)
def test_forms_of_answers(answers, expected):
    row = row_kind["question"].function(DataSection(path="f"), {"prompt": "q", "answers": answers}, 0)
    assert row == {"prompt": "q", "answers": expected}


def test_rows_that_only_ask_teach_nothing_and_one_sided_questions_measure_nothing(tmp_path, tiny_model):
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}", "answers": ["x"]}) + "\n" for i in range(3)))
    for answers in ([""], 5, [3]):
        with pytest.raises(RecipeError, match="row 3: 'answers' is"):
            row_kind["question"].function(DataSection(path="f"), {"prompt": "q", "answers": answers}, 3)
    recipe = {"job": "evaluate", "model": str(tiny_model), "tasks": {"a": {"kind": "decline", "data": str(file)}}}
    with pytest.raises(RecipeError, match="all 3 questions are answerable, expected some of either kind"):
        execute(parse(recipe), tmp_path / "r", quiet=True)
    train = {"job": "train", "model": str(tiny_model), "data": str(file), "trainer": {"max_steps": 1}}
    with pytest.raises(ModicumError, match="question rows, which ask and do not answer"):
        execute(parse(train), tmp_path / "t", quiet=True)


def test_made_sets_serve_training_and_both_measures(tiny_model, tmp_path):
    for name in ("instructions", "unanswerable"):
        made = load_rows(DataSection(path=f"task:{name}", size=8))
        assert made.kind == "preference" and made == load_rows(DataSection(path=f"preference:{name}", size=8))
    with pytest.raises(RecipeError, match="made from the seed, without shots"):
        load_rows(DataSection(path="task:instructions", config={"shots": 2}))
    rows = unanswerable("test", 40, 0)
    for row in rows:
        assert outcome(row["chosen"], row["answers"]) == ("right" if row["answers"] else "declined")
        assert outcome(row["rejected"], row["answers"]) == ("declined" if row["answers"] else "wrong")
    tasks = {
        "kept": {"kind": "instructions", "max_new_tokens": 3, "data": {"path": "task:instructions", "size": 4}},
        "known": {"kind": "decline", "max_new_tokens": 3, "data": {"path": "task:unanswerable", "size": 4}},
    }
    execute(parse({"job": "evaluate", "model": str(tiny_model), "tasks": tasks}), tmp_path / "run", quiet=True)
    cells = {cell["task"]: cell for cell in read_record(tmp_path / "run")["metrics"]["cells"]}
    assert cells["kept"]["metric"] == "kept" and {"words", "lower_case"} <= cells["kept"]["kinds"].keys()
    assert cells["known"]["metric"] == "f1" and cells["known"]["answerable"] == cells["known"]["unanswerable"] == 2
