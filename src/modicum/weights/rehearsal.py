"""Methods tried out before a merge: a knob that a method refuses is refused in the plan, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from modicum.errors import RecipeError, first_line
from modicum.registry import merge_method

if TYPE_CHECKING:
    from modicum.weights.plan import Step


def rehearse(steps: Iterable[Step]) -> None:
    """Call each method once for every set of knobs and number of experts, on a matrix of four entries.

    Raises:
        RecipeError: What the method says of its knobs, such as weights that sum to zero.
    """
    kinds: dict[str, Step] = {}
    for step in steps:
        if step.spec.dtype.is_floating_point:
            told = (step.method, len(step.experts), step.base is None, sorted(step.knobs.items()))
            kinds.setdefault(repr(told), step)
    for step in kinds.values():
        supplied = {"statistics": [torch.eye(2)] * len(step.experts)} if step.statistics else {}
        try:
            rehearse_method(step.method, len(step.experts), {**step.knobs, **supplied}, based=step.base is not None)
        except RecipeError as error:
            raise RecipeError(f"{step.name}: {error}" if len(kinds) > 1 else str(error)) from None


def rehearse_method(method: str, n: int, knobs: Mapping[str, Any], *, based: bool = True) -> None:
    """Call a method on a matrix of four entries of each of ``n`` experts.

    Raises:
        RecipeError: What the method says of its knobs.
    """
    base, *experts = torch.eye(2).repeat(n + 1, 1, 1)
    for number, expert in enumerate(experts, 1):
        expert[0, 1] = 0.1 * number  # all different, as experts are
    try:
        merge_method[method].function(base if based else None, experts, **knobs)
    except (RuntimeError, ArithmeticError) as error:  # a number that no tensor takes
        raise RecipeError(f"{method} cannot compute with its knobs: {first_line(error)} Correct them.") from None
