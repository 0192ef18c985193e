"""The loss over pairs beside its transcription, and the cases with exact values."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modicum.errors import RecipeError
from modicum.objectives.dpo import dpo_loss
from oracles import preferences as oracle

PAIR = [torch.tensor([x], dtype=torch.float64) for x in (-10.0, -9.0, -12.0, -8.0)]
sums = st.floats(-400, -0.01)
rows = st.lists(st.tuples(sums, sums, sums, sums, st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("knobs", "value"),
    [
        ({}, 0.554355),  # H1
        ({"label_smoothing": 0.1}, 0.584355),  # H3
        ({"variant": "ipo"}, 4.0),
        ({"variant": "hinge"}, 0.7),
        ({"sft_weight": 1.0, "chosen_tokens": 4}, 3.054355),  # H4
    ],
)
def test_exact_cases(knobs, value):
    assert dpo_loss(*PAIR, **knobs).item() == pytest.approx(value, abs=1e-6)


def test_the_gradient_of_the_first_case():
    won = PAIR[0].clone().requires_grad_()
    dpo_loss(won, *PAIR[1:]).backward()
    assert won.grad.item() == pytest.approx(-0.0425557, abs=1e-7)


@given(st.floats(1e-3, 10), st.floats(0, 0.49))
def test_at_the_reference_the_loss_is_ln_2(beta, smoothing):
    found = dpo_loss(PAIR[0], PAIR[1], PAIR[0], PAIR[1], beta=beta, label_smoothing=smoothing)
    assert found.item() == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.oracle("objectives", "dpo")
@given(rows, st.floats(0.01, 2), st.sampled_from(["sigmoid", "ipo", "hinge"]), st.booleans(), st.booleans())
def test_dpo_equals_its_oracle(rows, beta, variant, means, extras):
    smoothing, sft = (0.2, 0.7) if extras else (0.0, 0.0)
    columns = torch.tensor(rows, dtype=torch.float64).T
    knobs = {"variant": variant, "label_smoothing": smoothing, "length_normalised": means, "sft_weight": sft}
    expected = oracle.dpo(rows, beta=beta, variant=variant, smoothing=smoothing, means=means, sft=sft)
    assert dpo_loss(*columns, beta=beta, **knobs).item() == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_short_types_are_computed_in_float32():
    found = dpo_loss(*(part.bfloat16() for part in PAIR))
    assert found.dtype == torch.float32 and found.item() == pytest.approx(0.554355, abs=1e-6)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0, expected a number above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing is 0.5, expected a number in \[0, 0.5\)"),
        ({"sft_weight": -1.0}, "sft_weight is -1.0"),
        ({"variant": "dpop"}, "variant is 'dpop'"),
        ({"sft_weight": 1.0}, "chosen_tokens is missing"),
        ({"length_normalised": True, "chosen_tokens": 3}, "rejected_tokens is missing"),
        ({"sft_weight": 1.0, "chosen_tokens": 0}, "chosen_tokens holds 0"),
        (
            {"sft_weight": 1.0, "chosen_tokens": torch.ones(3)},
            r"chosen_tokens has the shape \(3,\), expected one number",
        ),
        ({"beta": math.inf}, "beta is inf, expected a number above 0"),
        ({"sft_weight": math.inf}, "sft_weight is inf, expected a number of at least 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(knobs, message):
    with pytest.raises(RecipeError, match=message):
        dpo_loss(*PAIR, **knobs)
    with pytest.raises(RecipeError, match="expected one number for each pair"):
        dpo_loss(torch.zeros(2), *PAIR[1:])
    with pytest.raises(RecipeError, match="There is no pair"):
        dpo_loss(*[torch.zeros(0)] * 4)
