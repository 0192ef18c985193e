"""A chat model that answers from a function or a table: for tests, and to see what a job would do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from modicum.errors import RecipeError
from modicum.evaluate.chat import ChatRequest, ChatResult, Choice, fingerprint

Said: TypeAlias = "str | Choice"


class Scripted:
    """Answer from a script.

    Args:
        script: ``(request, index) -> text``, ``(request) -> text``, or a mapping from the last message to a text or to
            several, which are given in turn. A text may be a :class:`~modicum.evaluate.chat.Choice`.
        name: Goes into records.
        caps: What it can do.

    Example:
        >>> from modicum.evaluate.chat import user
        >>> echo = Scripted(lambda request: request.messages[-1]["content"].upper())
        >>> echo.generate([ChatRequest(user("hi"))])[0].choices[0].text
        'HI'
    """

    def __init__(
        self,
        script: Callable[..., Said] | Mapping[str, Said | Sequence[Said]],
        *,
        name: str = "scripted",
        caps: Sequence[str] = ("n", "seed", "prefill", "sampling"),
    ) -> None:
        self.script, self.name, self.caps, self.calls = script, name, frozenset(caps), 0

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request ``n`` times."""
        self.calls += len(requests)
        return [ChatResult(tuple(self._said(r, index) for index in range(r.params.n))) for r in requests]

    def _said(self, request: ChatRequest, index: int) -> Choice:
        if callable(self.script):
            said = self.script(request, index) if _takes_two(self.script) else self.script(request)
        else:
            asked = request.messages[-1]["content"]
            if asked not in self.script:
                raise RecipeError(f"The script has no answer to a text with the SHA-256 {fingerprint(asked)[:12]}….")
            told = self.script[asked]
            said = told if isinstance(told, str | Choice) else told[index % len(told)]
        return said if isinstance(said, Choice) else Choice(said)


def _takes_two(function: Callable[..., Said]) -> bool:
    import inspect

    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    # A parameter with a default is the script's own, such as a value that a lambda keeps.
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in places and p.default is p.empty for p in parameters) > 1
