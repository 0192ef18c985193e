import pytest
import torch

from modicum.errors import ModicumError
from modicum.objectives.dropout import dropout


def test_a_share_is_dropped_and_the_rest_keeps_the_mean():
    out = dropout({"hidden_states": torch.ones(8, 50, 20)}, ratio=0.2, rng=torch.Generator())["hidden_states"]
    assert float((out == 0).double().mean()) == pytest.approx(0.2, abs=0.02)
    assert float(out.mean()) == pytest.approx(1.0, abs=0.03)
    assert not torch.equal(out[0], out[1])


def test_ratio_zero_changes_nothing():
    hidden = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dropout({"hidden_states": hidden}, ratio=0.0, rng=torch.Generator())["hidden_states"], hidden)


def test_dropping_everything_and_missing_states_are_refused():
    with pytest.raises(ModicumError, match="ratio is 1"):
        dropout({"hidden_states": torch.ones(1, 1, 1)}, ratio=1.0, rng=torch.Generator())
    with pytest.raises(ModicumError, match="hidden_states"):
        dropout({}, rng=torch.Generator())
