"""Parameters, knobs and losses that a zeroth-order step refuses."""

import pytest
import torch
from torch import nn

from modicum.errors import CheckpointError, RecipeError, UnsupportedError
from modicum.optim import MeZO, TeZO


def flat_parameter():
    """A parameter as FSDP1 marks those that it flattened."""
    parameter = nn.Parameter(torch.zeros(8))
    parameter._is_flat_param = True
    return parameter


def weights(*shapes):
    return [nn.Parameter(torch.zeros(shape)) for shape in shapes]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (list, RecipeError, "params is empty"),
        (lambda: weights((2, 2))[0], RecipeError, "params is one tensor"),
        (lambda: weights((2, 2)) * 2, RecipeError, "holds a parameter twice"),
        (lambda: [nn.Parameter(torch.zeros(2, 2, device="meta"))], UnsupportedError, "on the meta device"),
        (
            lambda: [nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)],
            UnsupportedError,
            "uint8: a quantized weight cannot be changed in place",
        ),
        (lambda: (lambda w: [w, nn.Parameter(w.data)])(weights((2, 2))[0]), RecipeError, "share their memory"),
        (lambda: [flat_parameter()], UnsupportedError, "is an FSDP1 flat parameter"),
    ],
)
def test_unusable_parameters_are_refused(params, error, message):
    with pytest.raises(error, match=message):
        MeZO(params(), lr=1e-3)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"weight_decay": 0.1, "engine": "adapter"}, "weight_decay=0.1 needs engine='mutate'"),
        ({"passes": 2, "engine": "adapter"}, "passes=2 needs engine='mutate'"),
        ({"parallel": "query"}, "different rounding residues"),
    ],
)
def test_combinations_that_cannot_be_done_are_refused(knobs, message):
    with pytest.raises(UnsupportedError, match=message):
        TeZO(weights((4, 4)), lr=1e-3, rank=2, **knobs)


def test_a_step_without_a_loss_is_refused():
    optimizer = MeZO(weights((2, 2)), lr=1e-3)
    with pytest.raises(UnsupportedError, match="nothing to go by"):
        optimizer.step()
    with pytest.raises(UnsupportedError, match=r"tensor of shape \(3,\), expected one scalar"):
        optimizer.step(lambda: torch.zeros(3))
    with pytest.raises(UnsupportedError, match="cannot be added later"):
        optimizer.add_param_group({"params": weights((2, 2))})


def test_state_of_another_run_is_refused():
    state = TeZO(weights((4, 4)), lr=1e-3, rank=2).state_dict()
    with pytest.raises(CheckpointError, match="has seed 0, this optimizer has 1"):
        TeZO(weights((4, 4)), lr=1e-3, rank=2, seed=1).load_state_dict(state)
    with pytest.raises(CheckpointError, match="has ranks 2 for 0, this optimizer has 3"):
        TeZO(weights((4, 4)), lr=1e-3, rank=3).load_state_dict(state)
    with pytest.raises(CheckpointError, match="was not written by a zeroth-order optimizer"):
        MeZO(weights((4, 4)), lr=1e-3).load_state_dict(torch.optim.SGD(weights((4, 4)), lr=1e-3).state_dict())
