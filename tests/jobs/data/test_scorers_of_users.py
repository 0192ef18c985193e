"""Scores and scorers that users bring: whatever is wrong with them is one line."""

from __future__ import annotations

import pytest

from modicum.errors import RecipeError
from modicum.jobs.data.scoring import load_function, of_function, read_scores, score_pairs

ROWS = [{"prompt": "1 + 1?", "chosen": "2", "rejected": "33"}]


@pytest.mark.parametrize(
    "code",
    ["raise RuntimeError('no')", "1 / 0", "import sys; sys.exit(0)", "undefined", "def f(:", "raise OSError", "\0"],
)
def test_code_that_fails_while_it_is_loaded_is_one_line(tmp_path, code):
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(RecipeError, match=r"mine\.py:score cannot be loaded: .*Correct its code"):
        load_function(f"{tmp_path}/mine.py:score")


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemExit", "raise OSError('gone')"])
def test_code_that_fails_on_an_answer_is_one_line(tmp_path, code):
    (tmp_path / "mine.py").write_text(f"def score(prompt, answer):\n    {code}\n")
    with pytest.raises(RecipeError, match="The scorer score fails on the answer '2' .*Correct its code"):
        score_pairs(ROWS, of_function(load_function(f"{tmp_path}/mine.py:score")))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"prompt": ' + "[" * 100_000])
def test_scores_that_are_nested_beyond_measure_are_one_line(tmp_path, text):
    (tmp_path / "scores.jsonl").write_text(text)
    with pytest.raises(ValueError, match="is not a file of lines of JSON: it is nested too deeply"):
        read_scores(str(tmp_path / "scores.jsonl"))


@pytest.mark.parametrize("number", [10**400, -(10**400)])
def test_a_number_beyond_all_is_one_line(number):
    with pytest.raises(RecipeError, match="returned a number beyond all"):
        score_pairs(ROWS, of_function(lambda *_: [number]))


@pytest.mark.parametrize("gates", [["a"], 3, [10**400], [None], {"a": 1}])
def test_gates_that_are_no_numbers_are_one_line(gates):
    with pytest.raises(RecipeError, match="returned the gates"):
        score_pairs(ROWS, of_function(lambda *_: {"scores": [1.0], "gates": gates}))
