from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.evaluate import exact_match, extract, normalize
from modicum.evaluate.rows import Rows
from modicum.registry import measure
from oracles import evaluate as oracle

TEXTS = st.text(alphabet="aAthe ne4.,-\"'!b\n", max_size=12)


@pytest.mark.parametrize(("answer", "expected"), [("Paris.", "paris"), (" a\n b ", "A b"), ('"42"', "42")])
def test_case_space_and_edge_punctuation_do_not_matter(answer, expected):
    assert exact_match(answer, expected)


@pytest.mark.parametrize(("answer", "expected"), [("The answer is 42", "42"), ("-4", "4"), ("4.5", "45")])
def test_what_is_inside_the_answer_matters(answer, expected):
    assert not exact_match(answer, expected)


def test_the_last_match_is_the_answer():
    assert extract("Answer: 1\nAnswer: 2", r"Answer: (\d)") == "2"


def test_without_a_match_the_whole_text_is_the_answer():
    assert extract(" forty-two ", r"Answer: (\d)") == "forty-two"


@pytest.mark.parametrize("pattern", ["(", "no group", "(a)(b)"])
def test_a_pattern_needs_exactly_one_group(pattern):
    with pytest.raises(RecipeError, match="expected one around the answer|is no regular expression"):
        extract("x", pattern)


@pytest.mark.parametrize(
    ("text", "edges", "squad"),
    [
        (" The Cat's  tail. ", "the cat's tail", "cats tail"),
        ("an *A-B*", "an *a-b", "ab"),
        ("-4.5", "-4.5", "45"),
        ("a an the", "a an the", ""),
        ("STRASSE ß", "strasse ss", "strasse ß"),
    ],
)
def test_the_two_definitions_of_what_counts(text, edges, squad):
    assert (normalize(text), normalize(text, normalization="squad")) == (edges, squad)


@given(st.text(alphabet="aAnthe .,-_\n4", max_size=12), st.sampled_from(["edges", "squad"]))
def test_normalising_twice_is_normalising_once(text, normalization):
    once = normalize(text, normalization=normalization)
    assert normalize(once, normalization=normalization) == once


def test_one_of_several_right_answers_is_enough():
    assert exact_match("b", ["a", "B."]) and not exact_match("c", ["a", "b"]) and not exact_match("c", [])


@pytest.mark.oracle("measures", "exact_match")
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=6), st.sampled_from(["edges", "squad"]), st.booleans())
def test_the_share_of_exact_matches_equals_its_oracle(pairs, normalization, copied):
    pairs = [(said, f"{said}." if copied else right) for said, right in pairs]
    rows = Rows("completion", [{"prompt": "?", "completion": right} for _, right in pairs], normalization=normalization)
    subject = SimpleNamespace(generate=lambda rows, **_: [said for said, _ in pairs])
    entry = measure["exact_match"]
    items = entry.function(rows, subject)
    plain = oracle.edges if normalization == "edges" else oracle.squad
    assert [item["correct"] for item in items] == [plain(said) == plain(right) for said, right in pairs]
    found = entry.facts.estimate(items, level=0.9)
    low, high = oracle.wilson(sum(item["correct"] for item in items), len(items), 0.9)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-9), pytest.approx(high, abs=1e-9))
