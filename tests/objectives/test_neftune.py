import numpy as np
import pytest
import torch

from modicum.errors import ModicumError
from modicum.objectives.neftune import neftune
from modicum.philox import row_keys


@pytest.mark.oracle("objectives", "neftune")
def test_noise_equals_the_formula():
    keys = row_keys(["a"], seed=0, method="neftune")
    embeddings = torch.arange(12.0).reshape(1, 3, 4)
    got = neftune({"inputs_embeds": embeddings}, alpha=5.0, rng=keys)["inputs_embeds"].numpy()
    draw = torch.rand(3, 4, generator=torch.Generator().manual_seed(int(keys[0]))).double().numpy()
    expected = embeddings.double().numpy() + 5 / np.sqrt(3 * 4) * (2 * draw - 1)
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)


def test_noise_fills_its_range_evenly():
    out = neftune({"inputs_embeds": torch.zeros(4, 50, 64)}, alpha=5.0, rng=torch.Generator())["inputs_embeds"]
    scaled = out * (50 * 64) ** 0.5 / 5
    assert float(scaled.abs().max()) <= 1 and float(scaled.std()) == pytest.approx(3**-0.5, abs=0.01)
    assert abs(float(scaled.mean())) < 0.02 and not torch.equal(out[0], out[1])


def test_padding_does_not_count_and_the_type_is_kept():
    embeddings = torch.zeros(1, 8, 16, dtype=torch.bfloat16)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]])
    out = neftune({"inputs_embeds": embeddings, "attention_mask": mask}, rng=torch.Generator())["inputs_embeds"]
    assert out.dtype == torch.bfloat16 and float(out.abs().max()) <= 5 / (2 * 16) ** 0.5 * 1.01
    assert float(out.abs().max()) > 5 / (8 * 16) ** 0.5


def test_embeddings_are_required():
    with pytest.raises(ModicumError, match="inputs_embeds"):
        neftune({"input_ids": torch.zeros(1, 2)}, rng=torch.Generator())
