"""Methods tried out before a merge: a knob that a method refuses is refused in the plan, before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from modicum.errors import RecipeError, first_line

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
        base, *experts = torch.eye(2).repeat(len(step.experts) + 1, 1, 1)
        for number, expert in enumerate(experts, 1):
            expert[0, 1] = 0.1 * number  # all different, as experts are
        supplied = {"statistics": [torch.eye(2)] * len(experts)} if step.statistics else {}
        try:
            step.entry.function(base if step.base else None, experts, **step.knobs, **supplied)
        except RecipeError as error:
            raise RecipeError(f"{step.name}: {error}" if len(kinds) > 1 else str(error)) from None
        except (RuntimeError, ArithmeticError) as error:  # a number that no tensor takes
            problem = first_line(error)
            raise RecipeError(
                f"{step.name}: {step.method} cannot compute with its knobs: {problem} Correct them."
            ) from None
