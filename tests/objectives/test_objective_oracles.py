"""Objectives beside their transcriptions, over rows with prompts, padding on either side and protected ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.philox import dense_uniform, row_keys
from modicum.registry import objective
from oracles import objectives as oracle

MASK, VOCABULARY, PROTECTED = 999, 50, (3, 4)
KEYS = row_keys(["a", "b"], seed=0, method="oracle")
ratios = st.sampled_from([0.0, 0.15, 0.5, 1.0])
rows = st.lists(st.integers(3, 40), min_size=1, max_size=20)


def function(name: str) -> Any:
    return objective[name].function


def batch(row: list[int], prompt: int, padding: int, left: bool) -> dict[str, torch.Tensor]:
    """One row twice, padded to the left or to the right."""
    labels = [oracle.IGNORED if i < prompt else token for i, token in enumerate(row)]
    lists = {"input_ids": (row, 0), "labels": (labels, oracle.IGNORED), "attention_mask": ([1] * len(row), 0)}
    fill = {name: [value] * padding for name, (_, value) in lists.items()}
    padded = {n: fill[n] + numbers if left else numbers + fill[n] for n, (numbers, _) in lists.items()}
    return {name: torch.tensor([numbers, numbers]) for name, numbers in padded.items()}


@pytest.mark.oracle("objectives", "token_dropout")
@given(rows, st.integers(0, 3), st.booleans(), ratios, st.sampled_from([(0.0, 1.0), (0.8, 0.1), (1.0, 0.0)]))
def test_token_dropout_equals_its_oracle(row, padding, left, ratio, shares):
    given_batch = batch(row, 0, padding, left)
    knobs = {"ratio": ratio, "mask_share": shares[0], "random_share": shares[1]}
    found = function("token_dropout")(
        given_batch, **knobs, mask_token_id=MASK, vocab_size=VOCABULARY, protect_ids=PROTECTED, rng=KEYS
    )
    for number, key in enumerate(KEYS.tolist()):
        ids, real = (given_batch[name][number].tolist() for name in ("input_ids", "attention_mask"))
        expected = oracle.token_dropout(ids, real, PROTECTED, key, **knobs, mask=MASK, vocabulary=VOCABULARY)
        assert found["input_ids"][number].tolist() == expected


@pytest.mark.oracle("objectives", "masked_thought")
@given(rows, st.integers(0, 5), st.integers(0, 3), st.booleans(), ratios, st.integers(0, 12), st.booleans())
def test_masked_thought_equals_its_oracle(row, prompt, padding, left, ratio, step, replace):
    given_batch = batch(row, prompt, padding, left)
    kind = {"replacement": "random", "vocab_size": VOCABULARY} if replace else {"mask_token_id": MASK}
    found = function("masked_thought")(
        given_batch, step, 12, ratio=ratio, warmup_share=0.5, protect_ids=PROTECTED, rng=KEYS, **kind
    )
    for number, key in enumerate(KEYS.tolist()):
        ids, labels, real = (given_batch[n][number].tolist() for n in ("input_ids", "labels", "attention_mask"))
        written = {"vocabulary": VOCABULARY} if replace else {"mask": MASK}
        share = ratio * min(1.0, step / (0.5 * 12))
        expected = oracle.masked_thought(ids, labels, real, PROTECTED, key, share=share, **written)
        assert found["input_ids"][number].tolist() == expected


@pytest.mark.oracle("objectives", "meap")
@given(rows, st.integers(0, 3), st.booleans(), ratios, st.integers(0, 2), st.booleans())
def test_meap_equals_its_oracle(row, padding, left, ratio, least, keep_last):
    given_batch = batch(row, 0, padding, left)
    knobs = {"ratio": ratio, "min_masks": least, "exclude_last": keep_last, "protect_ids": PROTECTED}
    found = function("meap")(given_batch, mask_token_id=MASK, rng=KEYS, **knobs)
    for number, key in enumerate(KEYS.tolist()):
        ids, real = (given_batch[name][number].tolist() for name in ("input_ids", "attention_mask"))
        expected = oracle.meap(ids, real, PROTECTED, key, ratio=ratio, least=least, keep_last=keep_last, mask=MASK)
        assert found["input_ids"][number].tolist() == expected


@pytest.mark.oracle("objectives", "meap_sft")
@given(rows, st.integers(0, 5), st.integers(0, 3), st.booleans(), ratios, st.integers(0, 6))
def test_meap_sft_equals_its_oracle(row, prompt, padding, left, ratio, least):
    found = function("meap_sft")(
        batch(row, prompt, padding, left),
        ratio=ratio,
        min_answer_tokens=least,
        mask_token_id=MASK,
        protect_ids=PROTECTED,
        rng=KEYS,
    )
    labels = [oracle.IGNORED if i < prompt else token for i, token in enumerate(row)]
    expected = [
        made
        for key in KEYS.tolist()
        for made in oracle.meap_sft(row, labels, PROTECTED, key, ratio=ratio, least=least, mask=MASK)
    ]
    made = zip(found["input_ids"].tolist(), found["labels"].tolist())
    assert [(ids[: len(row)], labels[: len(row)]) for ids, labels in made] == expected


@pytest.mark.oracle("objectives", "dropout")
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.9])
def test_dropout_equals_its_oracle_given_the_draws(ratio):
    hidden = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    uniform = dense_uniform(KEYS, (5, 3), device=hidden.device).numpy()
    found = function("dropout")({"hidden_states": hidden}, ratio=ratio, rng=KEYS)["hidden_states"]
    np.testing.assert_allclose(found.numpy(), oracle.dropout(hidden.numpy(), uniform, ratio), rtol=1e-6)


@pytest.mark.oracle("objectives", "label_words", "multiple_choice", "reward")
@pytest.mark.parametrize("candidates", [1, 2, 5])
def test_losses_of_answers_equal_their_oracles(candidates):
    scores = 4 * torch.randn(7, candidates, generator=torch.Generator().manual_seed(candidates))
    answers = torch.arange(7) % candidates
    for name, knobs, expected in (
        ("label_words", {}, oracle.label_words),
        ("multiple_choice", {"learn": "choice"}, oracle.label_words),
        ("multiple_choice", {"learn": "likelihood"}, oracle.likelihood),
    ):
        found = float(function(name)(scores, answers, **knobs))
        assert found == pytest.approx(expected(scores.numpy(), answers.numpy()), rel=1e-5, abs=1e-6)
    rewards = torch.rand(7, generator=torch.Generator().manual_seed(0))
    assert float(function("reward")(rewards)) == pytest.approx(oracle.reward(rewards))
