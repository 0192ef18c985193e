"""Rows are packed, cut and padded."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import make

from modicum.errors import CheckpointError
from modicum.jobs.data.rows import collate
from modicum.types import IGNORED
from support import byte_tokenizer, tiny_llama


@given(st.lists(st.text(max_size=30), min_size=1, max_size=6), st.integers(2, 40))
def test_packed_text_is_every_document_in_order_in_full_blocks(texts, length):
    tokenizer = byte_tokenizer()
    rows = [{"text": text} for text in texts]
    expected = [i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    if len(expected) < 2:
        return
    found = make("text", rows, tokenizer, max_length=length, packing=True)["input_ids"]
    assert all(len(block) == length for block in found[:-1])
    joined = [i for block in found for i in block]
    # A last block of a single token has nothing to predict.
    assert joined == expected if len(expected) % length != 1 else joined == expected[:-1]


def test_text_is_cut_with_a_note_when_it_is_not_packed(tokenizer):
    notes: list[str] = []
    found = make("text", [{"text": "a" * 9}, {"text": "b"}], tokenizer, notes.append, max_length=5)
    assert [len(ids) for ids in found["input_ids"]] == [5, 2]
    assert notes == [
        "1 of 2 rows are longer than max_length 5 and were cut; 0 had nothing left to learn and were dropped. "
        "data.long_rows: drop leaves them out."
    ]


@pytest.mark.parametrize("packing", [True, False])
def test_rows_that_are_too_long_are_left_out_where_none_may_be_cut(tokenizer, packing):
    """An answer that is cut teaches to stop in the middle, and arms that cut are not comparable with arms that drop."""
    notes: list[str] = []
    rows = [{"prompt": "p", "completion": "c" * 60}, {"prompt": "p", "completion": "c"}]
    knobs = {"max_length": 60, "long_rows": "drop", "packing": packing}
    found = make("completion", rows, tokenizer, notes.append, **knobs)
    assert found["input_ids"] == make("completion", rows[1:], tokenizer, max_length=60, packing=packing)["input_ids"]
    assert "1 of 2 rows are longer than max_length 60 and were left out; none is cut." in notes[0]
    with pytest.warns(UserWarning, match="1 of 2 rows"):
        make("completion", rows, tokenizer, **knobs)
    with pytest.raises(CheckpointError, match="all 1 rows are longer than max_length 60. Raise it"):
        make("completion", rows[:1], tokenizer, **knobs)


def test_rows_whose_answer_does_not_fit_are_dropped_with_a_note(tokenizer):
    notes: list[str] = []
    rows = [{"prompt": "p" * 90, "completion": "c"}, {"prompt": "p", "completion": "c"}]
    assert len(make("completion", rows, tokenizer, notes.append, max_length=60)) == 1
    assert "1 had nothing left to learn and were dropped" in notes[0]
    for packing in (True, False):
        with pytest.raises(CheckpointError, match="nothing to learn within max_length 60. Raise it"):
            make("completion", rows[:1], tokenizer, max_length=60, packing=packing)


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20))
def test_packing_keeps_every_sample_whole_and_starts_its_positions_anew(lengths):
    tokenizer = byte_tokenizer()
    rows = [{"prompt": "p", "completion": chr(97 + i) * n} for i, n in enumerate(lengths)]
    alone = make("completion", rows, tokenizer, max_length=90)
    packed = make("completion", rows, tokenizer, max_length=90, packing=True)
    samples = []
    for row in packed:
        assert len(row["input_ids"]) <= 90
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["input_ids"])]
        for start, end in pairwise(starts):
            assert row["position_ids"][start:end] == list(range(end - start))
            samples.append((row["input_ids"][start:end], row["labels"][start:end]))
    assert sorted(samples) == sorted(zip(alone["input_ids"], alone["labels"], strict=True))


def test_packed_samples_do_not_see_each_other(tokenizer):
    model = tiny_llama(initializer_range=0.3).eval()
    rows = [{"prompt": "p" * n, "completion": "c" * (9 - n)} for n in (1, 5, 8, 2)]
    alone = make("completion", rows, tokenizer, max_length=200)
    packed = make("completion", rows, tokenizer, max_length=200, packing=True)
    assert sorted(map(len, packed["input_ids"])) != sorted(map(len, alone["input_ids"]))
    with torch.no_grad():
        batch = collate(tokenizer)([packed[i] for i in range(len(packed))])
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        for sample in alone:
            expected = model(torch.tensor([sample["input_ids"]])).logits[0]
            places = [
                (row, start)
                for row, ids in enumerate(batch["input_ids"].tolist())
                for start in range(len(ids))
                if ids[start : start + len(sample["input_ids"])] == sample["input_ids"]
            ]
            [(row, start)] = places
            torch.testing.assert_close(logits[row, start : start + len(expected)], expected, rtol=1e-4, atol=1e-4)


def test_the_loss_of_a_packed_batch_equals_that_of_the_samples(tokenizer):
    model = tiny_llama(initializer_range=0.3).eval()
    rows = [{"prompt": "p" * n, "completion": "c" * (12 - n)} for n in (1, 5, 8, 2, 3)]
    losses = []
    for packing in (False, True):
        data = make("completion", rows, tokenizer, max_length=128, packing=packing)
        with torch.no_grad():
            losses.append(model(**collate(tokenizer)([data[i] for i in range(len(data))])).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


def test_padding_is_on_the_right_masked_and_without_label(tokenizer):
    batch = collate(tokenizer)(
        [
            {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "attention_mask": [1, 1, 1]},
            {"input_ids": [8], "labels": [8], "attention_mask": [1]},
        ]
    )
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_a_tokenizer_without_padding_pads_with_its_end_token_or_is_refused():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    rows = [{"input_ids": [5, 6]}, {"input_ids": [5]}]
    assert collate(tokenizer)(rows)["input_ids"].tolist() == [[5, 6], [5, 2]]
    tokenizer.eos_token = None
    with pytest.raises(CheckpointError, match="neither a padding nor an end-of-text token"):
        collate(tokenizer)
