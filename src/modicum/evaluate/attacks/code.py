"""A goal inside a program that a model is asked to complete."""

from __future__ import annotations

import json
import re

from modicum.errors import RecipeError
from modicum.registry import attack

CODE_SLOT = re.compile(r"^([ \t]*)\{\{\s*wrapped_input\s*\}\}[ \t]*$", re.MULTILINE)


def _words(prompt: str, **_: object) -> str:
    return "".join(json.loads(word) for word in re.findall(r'my_list\.append\((".*")\)$', prompt, re.MULTILINE))


@attack(
    "code",
    laws={"reversible"},
    source="installed packages",
    wrappers="code_attack",
    example="def f():\n    my_list = []\n    {{ wrapped_input }}\n    return my_list",
    decode=_words,
)
def code(goal: str, *, template: str) -> str:
    r"""Append the words of a goal to a list in a program that has to be completed.

    Args:
        goal: The plain request.
        template: The program, with the slot ``{{ wrapped_input }}`` on a line of its own.

    Returns:
        The prompt.

    Raises:
        RecipeError: There is no such line, or there are two.

    Example:
        >>> print(code("sing now", template="my_list = []\n{{ wrapped_input }}"))
        my_list = []
        my_list.append("sing ")
        my_list.append("now")

    Cost:
        None to speak of.

    Deviates:
        A word keeps the white space behind it, so that the goal can be read out again.

    Reference:
        Q. Ren et al., "CodeAttack: Revealing Safety Generalization Challenges of Large Language Models via Code
        Completion", 2024, arXiv:2403.07865.
    """
    found = CODE_SLOT.findall(template)
    if len(found) != 1:
        raise RecipeError(f"The template has {len(found)} lines {{{{ wrapped_input }}}}, expected one for the goal.")
    words = re.findall(r"\s*\S+\s*|\s+", goal)
    lines = "\n".join(f"{found[0]}my_list.append({json.dumps(word)})" for word in words)
    return CODE_SLOT.sub(lambda _: lines, template)
