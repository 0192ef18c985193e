"""What annotations say of the shapes of tensors is true, and would be seen if it were not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from jaxtyping import Float, TypeCheckError
from torch import Tensor

from modicum.optim.gradient.adagc import adagc_factors
from modicum.optim.gradient.aggc import aggc_factors
from modicum.optim.gradient.entries import spam_clip, stable_spam_clip
from modicum.optim.gradient.gradients import scale_, tensor_norms
from modicum.optim.gradient.spikes import spike_score
from modicum.registry import gradient_rule
from support import checked

RULES: dict[str, Any] = {name: entry.function for name, entry in gradient_rule.items()}
RULES |= {"adagc": adagc_factors, "aggc": aggc_factors, "spam": spam_clip, "stable_spam": stable_spam_clip}
KNOBS = {"value": {"limit": 0.1}, "fixed_norm": {"limit": 0.1}, "aggc": {"steps": 10}, "clippy": {"accumulator": 0.1}}


def data(shape: tuple[int, ...], state: Any) -> dict[str, Any]:
    """Everything that a rule may ask for, by the name of its parameter."""
    draw = torch.rand(7, *shape, generator=torch.Generator().manual_seed(0)) + 0.1
    names = ("gradient", "weight", "update", "second_moment", "debiased_second_moment")
    known = dict(zip(names, draw.unbind()))
    return known | {"norms": draw.flatten()[:4], "state": state, "total": None, "lr": 0.1, "age": 30}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(3, 4), (5,), (2, 3, 2)])
def test_gradient_rules_keep_to_their_annotations(name: str, shape: tuple[int, ...]) -> None:
    wants = [p.name for p in inspect.signature(RULES[name]).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    state = None
    for _ in range(3):
        result = checked(RULES[name])(*(data(shape, state)[want] for want in wants), **KNOBS.get(name, {}))
        state = result[1] if "state" in wants else None


def test_what_rules_are_made_of_keeps_to_its_annotations() -> None:
    grads = [torch.ones(2, 3), torch.ones(())]
    checked(scale_)(grads, checked(tensor_norms)(grads))
    assert grads[0][0, 0] == pytest.approx(6**0.5)
    assert checked(spike_score)(torch.ones(9), window=3).count == 0


def test_shapes_that_do_not_fit_are_seen() -> None:
    def pair(a: Float[Tensor, "rank in"], b: Float[Tensor, "out rank"]) -> Float[Tensor, "out in"]:
        return b @ a if len(b) > 2 else a

    assert checked(pair)(torch.ones(1, 2), torch.ones(3, 1)).shape == (3, 2)
    for a, b in (((2, 4), (3, 1)), ((2, 4), (2,)), ((1, 4), (2, 1))):
        with pytest.raises(TypeCheckError):
            checked(pair)(torch.ones(a), torch.ones(b))
