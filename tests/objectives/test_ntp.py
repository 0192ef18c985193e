import pytest
import torch

from modicum.errors import ModicumError
from modicum.objectives.ntp import ntp


def test_the_batch_is_the_same_object():
    batch = {"input_ids": torch.arange(3)[None], "labels": torch.arange(3)[None]}
    assert ntp(batch, rng=torch.Generator()) is batch


def test_labels_are_required():
    with pytest.raises(ModicumError, match="no labels"):
        ntp({"input_ids": torch.arange(3)[None]})
