import pytest
import torch

from modicum.errors import ModicumError
from modicum.objectives.masked_thought import masked_thought
from modicum.philox import row_keys

MASK = 999


def batch(rows=200, prompt=10, answer=40):
    ids = torch.randint(3, 250, (rows, prompt + answer), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (100, 0.2), (200, 0.4), (299, 0.4)])
def test_the_rate_grows_to_its_end_over_two_thirds_of_training(step, share):
    given = batch()
    out = masked_thought(given, step, 300, mask_token_id=MASK, rng=torch.Generator())
    masked = out["input_ids"] == MASK
    assert not masked[:, :10].any() and out["labels"] is given["labels"]
    assert float(masked[:, 10:].double().mean()) == pytest.approx(share, abs=0.02)


def test_random_replacement_draws_from_the_vocabulary_and_spares_protected_ids():
    given = batch()
    given["input_ids"][:, 20] = 2
    out = masked_thought(
        given, 1, 1, replacement="random", ratio=1.0, vocab_size=50, protect_ids=(2,), rng=torch.Generator()
    )["input_ids"]
    changed = out[:, 10:][:, torch.arange(40) != 10]
    assert (out[:, 20] == 2).all() and changed.max() == 49 and changed.min() == 0
    assert len(changed.unique()) == 50


def test_packed_documents_draw_by_their_own_keys():
    keys = row_keys(["a", "b"], seed=0, method="m")
    ids = torch.arange(30)[None]
    packed = {"input_ids": ids, "labels": ids, "position_ids": torch.cat((torch.arange(12), torch.arange(18)))[None]}
    out = masked_thought(packed, 1, 1, mask_token_id=MASK, rng=keys)["input_ids"][0]
    alone = {"input_ids": ids[:, 12:], "labels": ids[:, 12:]}
    assert torch.equal(out[12:], masked_thought(alone, 1, 1, mask_token_id=MASK, rng=keys[1:])["input_ids"][0])


def test_what_is_missing_is_named():
    with pytest.raises(ModicumError, match="mask_token_id is missing"):
        masked_thought(batch(2), 1, 1, rng=torch.Generator())
    with pytest.raises(ModicumError, match="vocab_size is missing"):
        masked_thought(batch(2), 1, 1, replacement="random", rng=torch.Generator())
    with pytest.raises(ModicumError, match="no labels"):
        masked_thought({"input_ids": batch(2)["input_ids"]}, mask_token_id=MASK, rng=torch.Generator())
