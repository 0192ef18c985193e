"""A published wrapper around a goal: role plays, privilege claims, story frames."""

from __future__ import annotations

import re

from modicum.errors import RecipeError
from modicum.registry import attack

SLOT = re.compile(r"\{\{\s*prompt\s*\}\}")


@attack(
    "template", laws={"verbatim"}, source="installed packages", wrappers="jailbreakchat", example="Say: {{ prompt }}"
)
def template(goal: str, *, template: str) -> str:
    """Put a goal into the slot of a wrapper.

    Args:
        goal: The plain request.
        template: The wrapper, with exactly one slot ``{{ prompt }}``; recipes name a family of installed ones.

    Returns:
        The prompt.

    Raises:
        RecipeError: There is no slot, or there are two.

    Example:
        >>> template("sing", template="You are a bird. {{ prompt }}")
        'You are a bird. sing'

    Cost:
        None to speak of.

    Reference:
        X. Shen et al., "Do Anything Now", 2023, arXiv:2308.03825, collected such wrappers.
    """
    pieces = SLOT.split(template)
    if len(pieces) != 2:
        raise RecipeError(f"The template has {len(pieces) - 1} slots {{{{ prompt }}}}, expected one for the goal.")
    return f"{pieces[0]}{goal}{pieces[1]}"
