import pytest
import torch

from modicum.errors import ModicumError
from modicum.objectives.token_dropout import token_dropout

MASK = 999


def batch(rows=300, tokens=100):
    ids = torch.full((rows, tokens), 500)
    return {"input_ids": ids, "labels": ids}


def test_random_ids_replace_an_exact_count():
    given = batch()
    out = token_dropout(given, ratio=0.15, vocab_size=100, rng=torch.Generator())
    assert ((out["input_ids"] != 500).sum(-1) == 15).all() and out["labels"] is given["labels"]
    drawn = out["input_ids"][out["input_ids"] != 500]
    assert drawn.min() == 0 and drawn.max() == 99 and abs(float(drawn.double().mean()) - 49.5) < 2


def test_eighty_ten_ten_is_the_mix_of_bert():
    out = token_dropout(
        batch(), ratio=0.5, mask_share=0.8, random_share=0.1, mask_token_id=MASK, vocab_size=100, rng=torch.Generator()
    )["input_ids"]
    total = 300 * 50
    assert int((out == MASK).sum()) / total == pytest.approx(0.8, abs=0.015)
    assert int((out < 100).sum()) / total == pytest.approx(0.1, abs=0.015)


def test_protected_ids_stay():
    given = batch(4)
    given["input_ids"][:, ::2] = 7
    out = token_dropout(given, ratio=1.0, vocab_size=100, protect_ids=(7,), rng=torch.Generator())["input_ids"]
    assert (out[:, ::2] == 7).all() and (out[:, 1::2] < 100).all()


def test_what_is_missing_or_too_much_is_named():
    with pytest.raises(ModicumError, match="pass 1 together"):
        token_dropout(batch(1), mask_share=0.8, random_share=0.3, rng=torch.Generator())
    with pytest.raises(ModicumError, match="vocab_size is missing"):
        token_dropout(batch(1), rng=torch.Generator())
    with pytest.raises(ModicumError, match="mask_token_id is missing"):
        token_dropout(batch(1), mask_share=1.0, random_share=0.0, rng=torch.Generator())
