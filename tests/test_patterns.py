"""Regular expressions of others take bounded time, wherever they stand."""

from __future__ import annotations

import re
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum import patterns
from modicum.errors import ModicumError, RecipeError
from modicum.patterns import Pattern, try_pattern

TEXT = "model.layers.0.self_attn.q_proj.weight " * 4
NAMES = ["model.layers.0.mlp.down_proj", "lm_head", "", "é\n", "a" * 200]


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    began = time.process_time()
    yield
    assert time.process_time() - began < 3


@pytest.mark.parametrize("use", ["finds", "begins", "all_in", "replaced"])
def test_a_match_without_end_is_ended_and_named(soon, use):
    pattern = Pattern("(?R)", "exclude")
    arguments = ("x", TEXT) if use == "replaced" else (TEXT,)
    with pytest.raises(RecipeError, match=r"^exclude .* takes more than 0.2 s on .* letters"):
        getattr(pattern, use)(*arguments)


@pytest.mark.parametrize(
    "pattern",
    ["(", "[", "*", "a{99999999999}", "((a{100}){100}){100}", "(?P<a", r"\p{None}", "a" * 20_000, "(" * 5000, "(?"],
)
def test_what_is_no_expression_is_one_line(pattern):
    with pytest.raises(RecipeError, match="^exclude ") as refused:
        Pattern(pattern, "exclude")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 300


@given(st.text(alphabet=r"ab.*+?()[]{}|\\^$,12w", max_size=12), st.sampled_from(NAMES))
def test_it_finds_what_python_finds(pattern, name):
    try:
        expected = re.compile(pattern)
    except (re.error, OverflowError):
        return
    try:
        found = Pattern(pattern, "x").finds(name)
    except ModicumError:
        return
    assert found == bool(expected.search(name))


def test_a_pattern_for_another_library_is_tried_with_its_engine(soon):
    try_pattern(r".*\.mlp\..*", NAMES, "target_modules")
    with pytest.raises(RecipeError, match="target_modules .* takes more than 0.2 s"):
        try_pattern(r"(a|aa)+(a|aa)+$!", NAMES, "target_modules")
    with pytest.raises(RecipeError, match="is no regular expression"):
        try_pattern("(", NAMES, "target_modules")
    told = []
    thread = threading.Thread(target=lambda: told.append(try_pattern("lm", NAMES, "x")))  # hears no alarm
    thread.start()
    thread.join()
    assert told == [None]


def test_replacements_that_name_no_group_are_one_line():
    assert Pattern(r"layers\.\d+", "groups").replaced("all", "layers.3.x") == "all.x"
    with pytest.raises(RecipeError, match="groups"):
        Pattern("a", "groups").replaced(r"\7", "a")


def test_all_matches_of_an_expression_together_take_bounded_time(monkeypatch):
    monkeypatch.setattr(patterns, "TOTAL", 0.05)
    pattern, began = Pattern("(a|aa)+$", "exclude"), time.process_time()
    with pytest.raises(RecipeError, match=r"^exclude .* takes more than 0.05 s on all texts together"):
        for number in range(10_000):
            pattern.finds("a" * 17 + f"{number}")
    assert time.process_time() - began < 3
