import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import ModicumError
from modicum.evaluate.hidden_facts import (
    SUITES,
    Haystack,
    Item,
    make_items,
    name,
    read_lost_in_the_middle,
    read_ruler,
    score,
)
from modicum.evaluate.measures.retrieval import grids

PROSE = " ".join(f"Sentence number {i} says that the weather in town {i % 7} was mild and quiet." for i in range(300))


def haystack():
    return Haystack(PROSE, count=lambda text: len(text.split()))


@pytest.mark.parametrize("task", SUITES)
def test_every_item_keeps_its_length_and_answers_itself(task):
    items = make_items(task, haystack(), lengths=[160, 300], per_cell=2)
    assert len(items) == 2 * 5 * 2
    for item in items:
        assert 0.8 * item.length <= len(item.prompt.split()) <= item.length
        assert score(item.expected, item) == 1.0 and score("I do not know.", item) == 0.0
        assert all(answer in item.prompt for answer in item.answers)


@pytest.mark.parametrize("task", ["needle", "multi_key", "multi_needle", "variables"])
def test_the_fact_stands_at_its_depth(task):
    for depth in (0.0, 0.5, 1.0):
        [item] = make_items(task, haystack(), lengths=[400], depths=[depth], per_cell=1)
        body = item.prompt.rpartition("\n\n")[0]
        # A value stands behind the name that the question is about; a chain begins with the value itself.
        place = body.index(item.answers[0]) / len(body)
        assert abs(place - depth) < 0.12, (task, depth, place)


def test_documents_put_the_right_one_at_its_place():
    for depth, number in ((0.0, 1), (1 / 3, 4), (1.0, 10)):
        [item] = make_items("documents", haystack(), lengths=[500], depths=[depth], per_cell=1)
        asked = re.search(r"What is the .* of (\w+)\?", item.prompt)[1]
        assert f"Document [{number}] (Title: {asked})" in item.prompt and item.prompt.count("Document [") == 10


def test_chains_of_variables_hold_and_the_other_chain_does_not_count():
    [item] = make_items("variables", haystack(), lengths=[300], depths=[0.2], per_cell=1)
    holds = {}
    for target, source in re.findall(r"Let (\w+) = (\w+)\.", item.prompt):
        holds[target] = holds.get(source, source)
    asked = re.search(r"hold the value (\d+)", item.prompt)[1]
    assert sorted(v for v, value in holds.items() if value == asked) == sorted(item.answers)
    assert len(holds) == 8 and len(item.answers) == 4


@given(seed=st.integers(0, 2**32))
def test_no_name_is_in_both_splits(seed):
    assert name(random.Random(seed), "train") not in {name(random.Random(s), "test") for s in (seed, seed + 1)}
    from modicum.random import derive_seed

    assert derive_seed(0, "split", name(random.Random(seed), "train")) % 2 == 0
    assert derive_seed(0, "split", name(random.Random(seed), "test")) % 2 == 1


def test_items_depend_on_their_own_place_and_seed_alone():
    few = make_items("needle", haystack(), lengths=[120], depths=[0.5], per_cell=1)
    many = make_items("needle", haystack(), lengths=[90, 120], depths=[0.0, 0.5], per_cell=3)
    assert few[0] in many
    assert make_items("needle", haystack(), lengths=[120], depths=[0.5], per_cell=1, seed=1) != few
    assert make_items("needle", haystack(), lengths=[120], depths=[0.5], per_cell=1, split="train") != few


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("The code is 41,204.", 1.0), ("412040", 0.0), ("**41204**", 1.0), ("it is 9 and 41204", 1.0), ("", 0.0)],
)
def test_answers_count_as_whole_words(answer, expected):
    assert score(answer, Item("needle", "", ("41204",), "", 0.0, 1, "any")) == expected


def test_partial_answers_get_their_share_or_everything():
    answers = ("1", "2", "3", "4")
    assert score("1, 3", Item("t", "", answers, "", 0.0, 1)) == 0.5
    assert score("3", Item("t", "", answers, "", 0.0, 1, "any")) == 1.0


def test_grids_hold_the_means_and_leave_gaps_open():
    items = [Item("a", "", ("1",), "", d, n) for d, n in ((0.0, 10), (0.0, 10), (1.0, 20))]
    [grid] = grids(items, [1.0, 0.5, 0.25])
    assert grid.values == ((0.75, None), (None, 0.25)) and grid.counts == ((2, 0), (0, 1))
    with pytest.raises(ModicumError, match="2 scores for 3 items"):
        grids(items, [1.0, 0.0])


def test_the_public_files_are_read():
    contexts = [{"title": f"T{i}", "text": f"text {i}", "isgold": i == 1} for i in range(3)]
    [item] = read_lost_in_the_middle([{"question": "who?", "answers": ["Ann Lee", "A. Lee"], "ctxs": contexts}])
    assert item.depth == 0.5 and item.length == 3 and "Document [2] (Title: T1) text 1" in item.prompt
    assert score("It was Ann Lee", item) == 1.0
    [ruler] = read_ruler([{"input": "Find it.", "outputs": ["7", 8], "length": 4096, "answer_prefix": " It is"}])
    assert ruler.prompt == "Find it. It is" and ruler.length == 4096 and score("7 8", ruler) == 1.0


def test_wrong_files_texts_and_lengths_are_told():
    with pytest.raises(ModicumError, match="row 0: expected question"):
        list(read_lost_in_the_middle([{"question": "who?", "answers": ["x"], "ctxs": []}]))
    with pytest.raises(ModicumError, match="row 0: expected input"):
        list(read_ruler([{"prompt": "x"}]))
    with pytest.raises(ModicumError, match="no sentences"):
        Haystack("short", len)
    with pytest.raises(ModicumError, match="length 20 is too short"):
        make_items("needle", haystack(), lengths=[20], per_cell=1)
    with pytest.raises(ModicumError, match="length 90 is too short"):
        make_items("documents", haystack(), lengths=[90], per_cell=1)
    with pytest.raises(ModicumError, match="Did you mean 'needle'"):
        make_items("needles", haystack(), lengths=[100])
