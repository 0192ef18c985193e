"""Baselines that change how a model is asked, not what it has learned: less thinking, more thinking, a guard.

They are chat models around a chat model, so they are measured like any other target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from modicum.errors import RecipeError
from modicum.evaluate.chat import THINK, ChatModel, ChatRequest, ChatResult, Choice, Judge, JudgeItem, Usage, arriving
from modicum.knobs import guarded
from modicum.types import PositiveInt

SHORT = "This can be answered without much thought."
AGAIN = "Wait. Think about it once more."
REFUSAL = "I can't help with that."


class _Around:
    """A chat model inside another one."""

    what = ""

    def __init__(self, inner: ChatModel) -> None:
        self.inner = inner
        self.name = f"{inner.name}+{self.what}"
        self.caps = inner.caps

    def _needs_prefill(self) -> None:
        if "prefill" not in self.inner.caps:
            raise RecipeError(
                f"{self.inner.name} does not continue an answer that is begun for it, so {self.what} cannot."
            )


class ZeroThink(_Around):
    """Let a reasoning model answer at once: its reasoning is begun and closed, and empty.

    Args:
        inner: A model that continues an answer which is begun for it.
        tags: How reasoning opens and closes.

    Raises:
        RecipeError: The model cannot continue an answer.

    Example:
        >>> from modicum.evaluate.chat import user
        >>> from modicum.jobs.chat.scripted import Scripted
        >>> model = ZeroThink(Scripted(lambda request: request.prefill))
        >>> model.generate([ChatRequest(user("hi"))])[0].choices[0].text
        '<think>\\n\\n</think>\\n\\n'

    Reference:
        F. Jiang et al., "SafeChain", 2025, arXiv:2502.12025; the words are ours.
    """

    what = "zero_think"
    thought = ""

    def __init__(self, inner: ChatModel, *, tags: tuple[str, str] = THINK) -> None:
        super().__init__(inner)
        self._needs_prefill()
        self.prefill = f"{tags[0]}\n{self.thought}\n{tags[1]}\n\n"

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request."""
        return self.inner.generate([self._begun(request) for request in requests])

    def arriving(self, requests: Sequence[ChatRequest]) -> Iterator[list[tuple[int, ChatResult]]]:
        """Yield results with the numbers of their requests, as they come."""
        yield from arriving(self.inner, [self._begun(request) for request in requests])

    def _begun(self, request: ChatRequest) -> ChatRequest:
        return replace(request, prefill=self.prefill + (request.prefill or ""))


class LessThink(ZeroThink):
    """Let a reasoning model answer after one line of reasoning, which says that no more is needed.

    Args:
        inner: As for :class:`ZeroThink`.
        tags: Likewise.

    Reference:
        F. Jiang et al., "SafeChain", 2025, arXiv:2502.12025; the words are ours.
    """

    what = "less_think"
    thought = SHORT


@guarded
class MoreThink(_Around):
    """Let a reasoning model think again whenever it has closed its reasoning, a few times.

    Args:
        inner: As for :class:`ZeroThink`.
        times: How often it is sent back, at least 1.
        tags: How reasoning opens and closes.

    Raises:
        RecipeError: The model cannot continue an answer, or ``times`` is below 1.

    Cost:
        ``times`` + 1 generations of each answer.

    Deviates:
        The published decoder counts tokens, too; here ``max_tokens`` limits each round.

    Reference:
        F. Jiang et al., "SafeChain", 2025, arXiv:2502.12025; the words are ours.
    """

    what = "more_think"

    def __init__(self, inner: ChatModel, *, times: PositiveInt = 1, tags: tuple[str, str] = THINK) -> None:
        super().__init__(inner)
        self._needs_prefill()
        self.times, self.tags = times, tags

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request; samples are drawn one by one, since each goes on from its own reasoning."""
        found: list[list[ChatResult]] = [[] for _ in requests]
        owners = [(index, i) for index, request in enumerate(requests) for i in range(request.params.n)]
        results = self.inner.generate([requests[index].single(i) for index, i in owners])
        thoughts = [_thought(result) for result in results]
        for _ in range(self.times):
            again = [place for place, thought in enumerate(thoughts) if thought]
            asked = [
                replace(
                    requests[owners[place][0]].single(owners[place][1]),
                    prefill=f"{self.tags[0]}\n{thoughts[place]}\n{AGAIN}",
                )
                for place in again
            ]
            for place, result in zip(again, self.inner.generate(asked) if asked else [], strict=True):
                results[place] = _joined(result, f"{thoughts[place]}\n{AGAIN}", self.tags)
                thoughts[place] = _thought(results[place])
        for (index, _), result in zip(owners, results, strict=True):
            found[index].append(result)
        return [
            ChatResult(
                tuple(choice for part in parts for choice in part.choices),
                Usage(
                    sum(part.usage.prompt_tokens for part in parts), sum(part.usage.completion_tokens for part in parts)
                ),
                next((part.error for part in parts if part.error), None),
            )
            for parts in found
        ]


class Guarded(_Around):
    """Put a guard before or behind a model: the cheapest thing to compare a training with.

    Args:
        inner: The model.
        guard: Tells harm. What it cannot tell passes.
        where: ``front`` reads the request as if it were an answer, ``behind`` reads the answer, ``both`` both.

    Raises:
        RecipeError: ``where`` is unknown.

    Example:
        >>> from modicum.evaluate.chat import Verdict, user
        >>> from modicum.jobs.chat.scripted import Scripted
        >>> class Guard:
        ...     name, needs = "guard", frozenset()
        ...     def judge(self, items):
        ...         return [Verdict("bomb" in item.response) for item in items]
        >>> model = Guarded(Scripted(lambda request: "a bomb"), Guard())
        >>> model.generate([ChatRequest(user("hi"))])[0].choices[0].text
        "I can't help with that."

    Reference:
        H. Inan et al., "Llama Guard", 2023, arXiv:2312.06674, guards both sides of a conversation.
    """

    what = "guarded"

    def __init__(self, inner: ChatModel, guard: Judge, *, where: Literal["front", "behind", "both"] = "behind") -> None:
        super().__init__(inner)
        if where not in ("front", "behind", "both"):
            raise RecipeError(f"where is {where!r}, expected 'front', 'behind' or 'both'.")
        self.guard, self.where = guard, where
        self.name = f"{inner.name}+{guard.name}_{where}"

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request, or refuse in place of the model."""
        asked = [request.messages[-1]["content"] for request in requests]
        blocked = [False] * len(requests)
        if self.where != "behind":
            said = self.guard.judge([JudgeItem(text, text, text) for text in asked])
            blocked = [verdict.unsafe is True for verdict in said]
        passed = [i for i, stopped in enumerate(blocked) if not stopped]
        answered = dict(zip(passed, self.inner.generate([requests[i] for i in passed]) if passed else [], strict=True))
        results = [
            answered[i] if i in answered else ChatResult((Choice(REFUSAL),) * requests[i].params.n)
            for i in range(len(requests))
        ]
        if self.where == "front":
            return results
        places = [(i, j) for i in passed for j in range(len(results[i].choices))]
        items = [
            JudgeItem(asked[i], asked[i], results[i].choices[j].text, results[i].choices[j].reasoning)
            for i, j in places
        ]
        harmful = {place for place, said in zip(places, self.guard.judge(items), strict=True) if said.unsafe is True}
        return [
            replace(
                result, choices=tuple(Choice(REFUSAL) if (i, j) in harmful else c for j, c in enumerate(result.choices))
            )
            for i, result in enumerate(results)
        ]


def _thought(result: ChatResult) -> str | None:
    """Return the reasoning of an answer that has closed it."""
    if result.error or not result.choices or result.choices[0].incomplete():
        return None
    return result.choices[0].reasoning


def _joined(result: ChatResult, before: str, tags: tuple[str, str]) -> ChatResult:
    """Return an answer with the reasoning that was put before it."""
    if not result.choices:
        return result
    choice = result.choices[0]
    more, closed, answer = choice.text.partition(tags[1])
    if choice.reasoning is not None:  # the backend has seen where reasoning ends
        more, closed, answer = (
            choice.reasoning,
            tags[1] if choice.text or choice.finish_reason == "stop" else "",
            choice.text,
        )
    reasoning = f"{before}\n{more.strip()}"
    if not closed:
        return replace(result, choices=(Choice("", reasoning, "length"),))
    return replace(result, choices=(replace(choice, text=answer.lstrip(), reasoning=reasoning),))
