"""Any gradient rule by its name, ready to be attached to an optimiser."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from modicum.optim.gradient.clipper import NormClipper
from modicum.registry import gradient_rule

if TYPE_CHECKING:
    from modicum.optim.gradient.tensor_hook import TensorHook


def make_clipper(name: str, params: Iterable[Any], **knobs: Any) -> NormClipper | TensorHook:
    """Return the gradient rule called ``name`` for these parameters.

    Args:
        name: A name that ``modicum list gradient_rules`` shows.
        params: Parameters, or pairs of name and parameter.
        knobs: Knobs of the rule.

    Raises:
        RecipeError: There is no such rule, or a knob is unknown or out of range.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> clipper = make_clipper("zclip", model.named_parameters(), z=3.0).attach(optimizer)
    """
    entry = gradient_rule[name]
    values = entry.knobs(knobs)
    if inspect.isclass(entry.function):
        rule: Any = entry.function
        made: NormClipper | TensorHook = rule(params, **values)
        return made
    state_type = entry.facts.state
    if entry.facts.acts:
        from modicum.optim.gradient.tensor_hook import TensorHook

        return TensorHook(params, entry.function, acts=entry.facts.acts, state_type=state_type, knobs=values)
    return NormClipper(params, entry.function, state_type=state_type, knobs=values)
