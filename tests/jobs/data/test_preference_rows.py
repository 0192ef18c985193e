"""Rows of preferences in every form that users have, and their batches."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import normalizers

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.rows import Rows
from modicum.jobs.data.kinds.preference import preference
from modicum.jobs.data.pairs import Pair, PairCollator, encode_pairs
from modicum.jobs.data.rows import tokenize
from modicum.jobs.data.section import DataSection
from modicum.objectives import copies_attention
from support import byte_tokenizer

USER, GOOD, BAD = (
    {"role": r, "content": c} for r, c in (("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Red."))
)
SYSTEM, LAST = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "And now?"}
SECTION = DataSection(path="x")
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Sky?\n\nAssistant:"


def read(row, **section):
    return preference(DataSection(path="x", **section), row, 3)


@pytest.mark.oracle("row_kinds", "preference")
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "Blue.", "rejected": "Red."},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Sky?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"chosen": "\n\nHuman: Sky?\n\nAssistant: Blue.", "rejected": "\n\nHuman: Sky?\n\nAssistant: Red."},
    ],
)
def test_all_forms_of_a_chat_are_one_row(row):
    assert read(row) == {"messages": [USER], "chosen": "Blue.", "rejected": "Red."}


def test_texts_keep_their_prompt():
    pair = {"chosen": " Blue.", "rejected": " Red."}
    assert read({"prompt": "Sky?"} | pair, template="Q: {prompt}") == {"prompt": "Q: Sky?"} | pair
    assert read({"prompt": "Sky?", "chosen": [GOOD], "rejected": [BAD]})["prompt"] == "Sky?"
    assert (
        read({"q": "Sky?", "a": "x", "b": "y"}, fields={"prompt": "q", "chosen": "a", "rejected": "b"})["chosen"] == "x"
    )
    found = read({"chosen": DIALOGUE + " Blue.", "rejected": DIALOGUE + " Red."}, system="Be kind.")
    assert [m["role"] for m in found["messages"]] == ["system", "user", "assistant", "user"]


TEXTS = {"chosen": "The sky is\n blue.", "rejected": "The sky is\n black."}


def test_two_texts_lose_nothing_when_they_are_cut(tokenizer):
    cut = {"prompt": "The sky is", "chosen": "\n blue.", "rejected": "\n black."}
    assert read(TEXTS) == {**cut, "joined": True}
    assert read(TEXTS, template="Q: {prompt}")["prompt"] == "Q: The sky is"
    rows = Rows("preference", [read(TEXTS)])
    (plain,) = encode_pairs(rows, byte_tokenizer(chat=False), SECTION, note=print)
    wholes = [tokenizer.decode([*plain.prompt, *answer], skip_special_tokens=True) for answer in plain.answers]
    assert wholes == [*TEXTS.values()]
    (chat,) = encode_pairs(rows, tokenizer, SECTION, note=print)
    assert [tokenizer.decode(answer) for answer in chat.answers] == ["blue.<|im_end|>", "black.<|im_end|>"]


def test_two_texts_are_cut_as_trl_cuts_them():
    found, theirs = read(TEXTS), pytest.importorskip("trl").extract_prompt(TEXTS)
    assert all(found["prompt"] + found[side] == theirs["prompt"] + theirs[side] for side in ("chosen", "rejected"))


@pytest.mark.parametrize("prompt", ["Sky?", " Sky?\n", "And now?", [SYSTEM, USER, GOOD, LAST]])
def test_a_prompt_beside_conversations_repeats_how_they_begin(prompt):
    start = [SYSTEM, USER, GOOD, LAST]
    row = {"prompt": prompt, "chosen": [*start, GOOD], "rejected": [*start, BAD]}
    assert read(row) == {"messages": start, "chosen": "Blue.", "rejected": "Red."}


@pytest.mark.parametrize("prompt", ["Sea?", "Be kind.", "", [USER], [SYSTEM, LAST], [SYSTEM, USER, GOOD, LAST, GOOD]])
def test_a_prompt_beside_conversations_that_begin_otherwise_is_refused(prompt):
    start = [SYSTEM, USER, GOOD, LAST]
    row = {"prompt": prompt, "chosen": [*start, GOOD], "rejected": [*start, BAD]}
    with pytest.raises(RecipeError, match="x, row 3: the prompt .* is not how the conversations in 'chosen' and"):
        read(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "field 'rejected' is NoneType"),
        ({"prompt": "a", "chosen": "b", "rejected": " \n"}, "row 3: the answer in 'rejected' is empty"),
        ({"prompt": "a", "chosen": "b ", "rejected": "b"}, "row 3: chosen and rejected are the same text"),
        ({"prompt": " ", "chosen": "b", "rejected": "c"}, "the prompt is empty"),
        ({"prompt": 3, "chosen": "b", "rejected": "c"}, "the prompt is 3, expected text or a list of messages"),
        ({"prompt": [USER], "chosen": [USER], "rejected": [BAD]}, "'chosen' holds messages of user, expected one"),
        ({"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD]}, "expected one message of the assistant"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "the prompt holds no message"),
        ({"chosen": [1], "rejected": [BAD]}, "'chosen' is .1., expected a list of"),
    ],
)
def test_bad_pairs_are_named(row, message):
    with pytest.raises(RecipeError, match=message):
        read(row)


def rows_of(*rows):
    return Rows("preference", [read(row) for row in rows])


def test_long_pairs_are_left_out_and_never_cut(tokenizer):
    rows = rows_of(
        {"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b" * 200, "rejected": "c"}
    )
    notes = []
    kept = encode_pairs(rows, tokenizer, DataSection(path="x", max_length=80), note=notes.append)
    assert len(kept) == 1 and "1 of 2 pairs are longer than max_length 80 and were left out" in notes[0]
    with pytest.raises(CheckpointError, match="all 2 pairs are longer than max_length 8"):
        encode_pairs(rows, tokenizer, DataSection(path="x", max_length=8), note=notes.append)
    with pytest.raises(CheckpointError, match="holds text rows, expected pairs"):
        encode_pairs(Rows("text", [{"text": "a"}]), tokenizer, SECTION, note=notes.append)


def test_answers_are_what_is_generated_after_the_prompt(tokenizer):
    (pair,) = encode_pairs(
        rows_of({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}), tokenizer, SECTION, note=print
    )
    assert tokenizer.decode(pair.prompt).endswith("assistant\n")
    assert [tokenizer.decode(answer) for answer in pair.answers] == ["Blue.<|im_end|>", "Red.<|im_end|>"]


def test_the_earlier_turns_of_a_chat_are_prompt(tokenizer):
    row = {"messages": [USER, GOOD, USER], "chosen": "Blue.", "rejected": "Red."}
    (pair,) = encode_pairs(Rows("preference", [row]), tokenizer, SECTION, note=print)
    assert tokenizer.decode(pair.prompt).count("Blue.") == 1 and tokenizer.decode(pair.chosen) == "Blue.<|im_end|>"


def test_without_an_objective_the_chosen_answers_are_learned(tokenizer):
    notes = []
    found = tokenize(
        rows_of({"prompt": "Sky?", "chosen": "Blue.", "rejected": "Red."}), tokenizer, SECTION, note=notes.append
    )
    learned = [token for token, label in zip(found[0]["input_ids"], found[0]["labels"]) if label != -100]
    assert tokenizer.decode(learned) == "Blue.<|im_end|>" and "only their chosen answers are learned" in notes[0]


tokens = st.lists(st.integers(5, 60), min_size=1, max_size=9).map(tuple)


@given(st.lists(st.builds(Pair, tokens, tokens, tokens), min_size=1, max_size=6), st.booleans())
def test_batches_hold_every_token_once(pairs, shared):
    batch = PairCollator(0, shared=shared)(pairs)
    rows, width = batch["input_ids"].shape
    copies = 1 if shared else 2
    used = sum(copies * len(p.prompt) + len(p.chosen) + len(p.rejected) - 2 for p in pairs)
    assert width == max(
        len(p.prompt) + (sum(len(a) - 1 for a in p.answers) if shared else max(map(len, p.answers)) - 1) for p in pairs
    )
    assert used <= rows * width and (not shared or rows <= len(pairs))
    # Where a token is predicted, the token before it stands, at the place that it has in a row of its own.
    ids, places = batch["input_ids"].flatten(), batch["position_ids"].flatten()
    expected = [((*p.prompt, *a), len(p.prompt)) for p in pairs for a in p.answers]
    reads = iter(batch["reads"].tolist())
    for (row, start), count in zip(expected, batch["counts"], strict=True):
        assert count == len(row) - start
        for place, at in zip(range(start, len(row)), itertools.islice(reads, count)):
            assert ids[at] == row[place - 1] and places[at] == place - 1
    assert batch["targets"].tolist() == [token for p in pairs for answer in p.answers for token in answer]
    if shared:  # a token sees its prompt and its own answer, in order, and nothing else
        seen, at = batch["attention_mask"].flatten(1, 2), 0
        for (row, _), count in zip(expected, batch["counts"]):
            last = int(batch["reads"][at + count - 1])
            at += count
            visible = batch["input_ids"][last // width][seen[last // width, last % width]]
            assert visible.tolist() == list(row[:-1])


@given(tokens, tokens, tokens)
def test_a_pair_in_a_row_of_its_own_has_the_mask_of_two_copies(prompt, chosen, rejected):
    mask = PairCollator(0)([Pair(prompt, chosen, rejected)])["attention_mask"]
    copies = [0] * len(prompt) + [1] * (len(chosen) - 1) + [2] * (len(rejected) - 1)
    assert torch.equal(mask, copies_attention(torch.tensor([copies])))


def test_pairs_that_a_tokenizer_or_chat_template_cannot_carry_are_named(tokenizer):
    chats = rows_of({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(CheckpointError, match="x, row 0 is a chat, but the tokenizer has no chat template"):
        encode_pairs(chats, byte_tokenizer(chat=False), SECTION, note=print)
    lowering = byte_tokenizer(chat=False)
    lowering.backend_tokenizer.normalizer = normalizers.Lowercase()
    same = rows_of({"prompt": "Sky?", "chosen": "Blue.", "rejected": "BLUE."})
    with pytest.raises(CheckpointError, match="x, row 0: chosen and rejected are the same tokens"):
        encode_pairs(same, lowering, SECTION, note=print)


def test_a_numeric_mask_says_the_same():
    pairs = [Pair((5, 6), (7, 8), (9, 5)), Pair((5,), (7,), (9,))]
    seen = PairCollator(0)(pairs)["attention_mask"]
    added = PairCollator(0, mask=torch.float32)(pairs)["attention_mask"]
    assert torch.equal(added == 0, seen)
