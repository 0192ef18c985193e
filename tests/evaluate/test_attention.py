import numpy as np
import pytest
import torch

from modicum.errors import ModicumError
from modicum.evaluate.attention import attention_contrast, attention_mass, attention_of, measure_contrast
from support import tiny_llama


def attention(seed, shape=(2, 3, 4, 6, 6)):
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    hidden = torch.ones(shape[-2:]).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def oracle(a, b, selected, real):
    """Loop over every layer, row, head and query in NumPy."""
    means, variances = ([], []), ([], [])
    layers, rows, heads, queries, _ = a.shape
    for layer, r, h, q in np.ndindex(layers, rows, heads, queries):
        seen = [k for k in range(q + 1) if real[r, k]]
        chosen = [k for k in seen if selected[r, k]]
        others = [k for k in seen if not selected[r, k]]
        if not real[r, q] or not chosen or not others:
            continue
        for which, attn in enumerate((a, b)):
            means[which].append(attn[layer, r, h, q, chosen].mean())
            variances[which].append(attn[layer, r, h, q, others].var())
    (ma, mb), (va, vb) = (tuple(map(np.mean, pair)) for pair in (means, variances))
    return (ma - mb) / ma, (vb - va) / va


@pytest.mark.parametrize("padded", [False, True])
def test_the_contrast_equals_the_loop(padded):
    a, b = attention(0), attention(1)
    selected = torch.rand(3, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    real = torch.ones(3, 6, dtype=torch.bool)
    if padded:
        real[0, 4:] = False
        real[2, :2] = False
    got = attention_contrast(a, b, selected, key_mask=real if padded else None)
    assert tuple(got) == pytest.approx(oracle(a.numpy(), b.numpy(), selected.numpy(), real.numpy()), rel=1e-10)


def test_equal_attentions_do_not_differ():
    a = attention(0)
    assert attention_contrast(a, a, torch.eye(6, dtype=torch.bool)[:3]) == (0.0, 0.0)


def test_the_mass_of_segments_that_cover_everything_is_one():
    a = attention(0)
    first = torch.arange(6)[None].expand(3, 6) < 2
    mass = attention_mass(a, {"first": first, "rest": ~first})
    assert sum(mass.values()) == pytest.approx(1) and mass["first"] > 0


def test_models_are_compared_on_masked_input_and_inputs_within_one_model():
    plain, trained = (tiny_llama(seed=s, attn_implementation="eager").eval() for s in (0, 1))
    ids = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    masked = ids.clone()
    masked[:, [3, 7]] = 260
    models = measure_contrast(plain, trained, ids, masked)
    inputs = measure_contrast(plain, trained, ids, masked, between="inputs")
    expected = attention_contrast(attention_of(trained, ids), attention_of(trained, masked), ids != masked)
    assert inputs == expected and models != inputs


def test_what_cannot_be_compared_is_told():
    a = attention(0)
    with pytest.raises(ModicumError, match="expected the same"):
        attention_contrast(a, a[:1], torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises(ModicumError, match="No query sees"):
        attention_contrast(a, a, torch.ones(3, 6, dtype=torch.bool))
    with pytest.raises(ModicumError, match="eager"):
        attention_of(tiny_llama(), torch.tensor([[5, 6]]))
