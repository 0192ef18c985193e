"""Which questions are one: case, spaces and punctuation aside, but not what changes their sense."""

import pytest

from modicum.errors import RecipeError
from modicum.evaluate.rows import Rows
from modicum.jobs.data.overlap import check_apart, same_text


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is it  so?", "is it so"),
        ("\u201cIs it so?\u201d", "Is `it` so..."),
        ("Well, three - or four?", "well three \u2014 or four"),
        ("A list: 1. tea, 2. milk.", "a list 1 tea 2 milk"),
        ("3 \u2212 6?", "3 - 6"),
        ("1,000 people", "1000 people"),
        ("caf\u00e9", "CAFE\u0301"),
        ("**So?**", "so"),
    ],
)
def test_case_spaces_and_punctuation_do_not_count(one, other):
    assert same_text(one) == same_text(other)


SUMS = [
    "3 + 6",
    "3 - 6",
    "3 * 6",
    "3 / 6",
    "3 ** 6",
    "3 = 6",
    "3 < 6",
    "3 6",
    "3.6",
    "-3.6",
    "3%6",
    "3 ^ 6",
    "3 \u00d7 6",
]


@pytest.mark.parametrize(
    "texts",
    [
        [f"What is {each}?" for each in SUMS],
        ["4-7", "4 7", "4/7", "4*7"],
        ["minus .5", "minus 5"],
        ["5%", "5"],
        ["a cost of $5", "a cost of \u20ac5", "a cost of 5"],
        ["\u0915\u093f", "\u0915\u0940", "\u0915"],  # vowels of Hindi are marks
        ["f(x) = 2*x", "f(x) = 2/x", "f(x) = 2x"],
    ],
)
def test_signs_and_marks_count(texts):
    assert len({*map(same_text, texts)}) == len(texts)


def test_an_evaluation_of_other_sums_is_apart_and_of_the_same_is_not():
    learned, asked, same = (
        Rows("completion", [{"prompt": text, "completion": "9"}]) for text in ("3 + 6", "3 - 6", "3+6?")
    )
    check_apart(learned, asked)
    with pytest.raises(RecipeError, match="eval_data, row 0 .'3.6.'. asks what data, row 0 .'3 . 6'. teaches"):
        check_apart(learned, same)
