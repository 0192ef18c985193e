import numpy as np
import pytest
import torch

from modicum.errors import ModicumError
from modicum.objectives.neftune import neftune
from modicum.objectives.philox import row_keys
from oracles.meap import word


def test_noise_equals_the_formula():
    keys = row_keys(["a"], seed=0, method="neftune")
    embeddings = torch.arange(12.0, dtype=torch.float64).reshape(1, 3, 4)
    got = neftune({"inputs_embeds": embeddings}, alpha=5.0, rng=keys)["inputs_embeds"].numpy()
    epsilon = np.array([word(int(keys[0]), place) for place in range(12)]) / 2**31 - 1
    np.testing.assert_allclose(got, embeddings.numpy() + 5 / np.sqrt(3 * 4) * epsilon.reshape(1, 3, 4), rtol=1e-12)


def test_padding_does_not_count_and_the_type_is_kept():
    embeddings = torch.zeros(1, 8, 16, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]])
    out = neftune({"inputs_embeds": embeddings, "attention_mask": mask}, rng=torch.Generator())["inputs_embeds"]
    assert out.dtype == torch.bfloat16 and float(out.abs().max()) <= 5 / (2 * 16) ** 0.5 * 1.01
    assert float(out.abs().max()) > 5 / (8 * 16) ** 0.5


def test_embeddings_are_required():
    with pytest.raises(ModicumError, match="inputs_embeds"):
        neftune({"input_ids": torch.zeros(1, 2)}, rng=torch.Generator())
