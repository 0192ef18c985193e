from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError, UnsupportedError
from modicum.evaluate import bits_per_byte, log_likelihoods, perplexity, windows
from oracles import evaluate as oracle
from support import tiny_llama


@st.composite
def cuts(draw):
    size = draw(st.integers(2, 20))
    return draw(st.integers(0, 70)), size, draw(st.integers(1, size - 1))


@given(cuts(), st.integers(1, 40))
def test_every_token_behind_the_context_is_scored_once_with_enough_before_it(cut, context):
    length, size, stride = cut
    found = windows(length, size=size, stride=stride, context=context)
    assert [i for w in found for i in range(w.first, w.end)] == list(range(context, length))
    assert context > 1 or found == windows(length, size=size, stride=stride)
    for window in found:
        assert 0 <= window.start < window.first
        assert window.end - window.start <= size
        assert window.start == 0 or window.first - window.start >= size - stride


@pytest.mark.parametrize("stride", [0, 8, 9])
def test_windows_that_leave_no_context_are_refused(stride):
    with pytest.raises(RecipeError, match="stride"):
        windows(10, size=8, stride=stride)


@pytest.fixture(scope="module")
def model():
    return tiny_llama(seed=1).double().eval()


@pytest.fixture(scope="module")
def documents():
    rng = torch.Generator().manual_seed(0)
    return [torch.randint(0, 264, (n,), generator=rng).tolist() for n in (1, 2, 7, 30, 0, 12)]


@pytest.mark.oracle("measures", "perplexity")
@pytest.mark.parametrize(("size", "stride"), [(8, 7), (8, 3), (2, 1), (64, 63)])
def test_likelihood_equals_scoring_token_after_token(model, documents, size, stride):
    @torch.no_grad()
    def next_token(context):
        return model(torch.tensor([context])).logits[0, -1].softmax(-1).tolist()

    found = log_likelihoods(model, documents, size=size, stride=stride, batch_size=3)
    expected = [oracle.document_nats(next_token, document, size, stride) for document in documents]
    # The model computes in float64; the loss is taken in float32, as with any model.
    assert found == pytest.approx(expected, rel=1e-6)


def test_batch_size_and_order_change_nothing_but_rounding(model, documents):
    one = log_likelihoods(model, documents, size=8, stride=4, batch_size=1)
    many = log_likelihoods(model, documents[::-1], size=8, stride=4, batch_size=50)
    assert one == pytest.approx(many[::-1], rel=1e-6)


def test_a_window_beyond_the_models_positions_is_refused(model):
    with pytest.raises(UnsupportedError, match="256 positions"):
        log_likelihoods(model, [[1, 2]], size=257, stride=256)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    nats = [10 * math.log(264), 5 * math.log(264)]
    assert perplexity(nats, [10, 5]).value == pytest.approx(264)
    assert bits_per_byte(nats, [10, 5]).value == pytest.approx(math.log2(264))


def test_a_hopeless_model_has_infinite_perplexity_instead_of_an_overflow():
    assert perplexity([1e6], [1]).value == math.inf
