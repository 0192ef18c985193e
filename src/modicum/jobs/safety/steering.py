"""Lead a small teacher through the form of a reply: its reasoning first, the verdict of the data, then its answer.

A model of a hundred million parameters does not keep to a form by being asked. Its words are its own here; only the
tags and the line with the verdict are put into its mouth. What a limit has cut is cut back to whole sentences. Rows
made so say so in their provenance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from modicum.errors import RecipeError
from modicum.evaluate.chat import THINK, ChatModel, ChatRequest, ChatResult, Choice

VERDICTS: Mapping[bool, Literal["refuse", "comply"]] = {True: "refuse", False: "comply"}


class Steered:
    """A teacher whose replies have the form of the contract, and the verdict of the data.

    Args:
        inner: The teacher; it must continue an answer that is begun for it.
        harmful: Whether the request of a tag is harmful.
        reasoning_tokens: Limit on the reasoning.

    Raises:
        RecipeError: The teacher cannot continue an answer.

    Reference:
        "ThinkSafe", 2026, arXiv:2601.23143, steers a model's own traces by the label; the form is ours.
    """

    def __init__(self, inner: ChatModel, harmful: Mapping[str, bool], *, reasoning_tokens: int = 96) -> None:
        if "prefill" not in inner.caps:
            raise RecipeError(f"{inner.name} does not continue an answer that is begun for it. Set steer: false.")
        self.inner, self.harmful, self.reasoning_tokens = inner, harmful, reasoning_tokens
        self.name, self.caps = f"{inner.name}+steered", inner.caps

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request in two steps."""
        begun = [
            replace(request, prefill=f"{THINK[0]}\n", params=replace(request.params, max_tokens=self.reasoning_tokens))
            for request in requests
        ]
        thoughts = self.inner.generate(begun)
        asked: list[ChatRequest] = []
        reasonings: list[str] = []
        for request, result in zip(requests, thoughts, strict=True):
            for index, choice in enumerate(result.choices):
                reasonings.append(self._reasoning(choice, request.tag))
                prefill = f"{THINK[0]}\n{reasonings[-1]}\n{THINK[1]}\n\n"
                asked.append(replace(request.single(index), prefill=prefill))
        answers = iter(zip(reasonings, self.inner.generate(asked) if asked else [], strict=True))
        found = []
        for result in thoughts:
            choices, error = [], result.error
            for _ in result.choices:
                reasoning, answer = next(answers)
                error = error or answer.error
                choices += [_finished(choice, reasoning) for choice in answer.choices]
            found.append(ChatResult(tuple(choices), result.usage, error))
        return found

    def _reasoning(self, choice: Choice, tag: str) -> str:
        """Return whole sentences of the reasoning, with the verdict of the data as their last line."""
        said = (choice.reasoning or choice.text).partition(THINK[1])[0]
        lines = [line for line in said.strip().splitlines() if not line.strip().lower().startswith("verdict")]
        text = "\n".join(lines).strip()
        if choice.finish_reason == "length":
            text = whole_sentences(text) or text
        return f"{text}\nVerdict: {VERDICTS[self.harmful[tag]]}"


def _finished(choice: Choice, reasoning: str) -> Choice:
    """Return an answer with its reasoning, cut back to whole sentences where a limit has cut it."""
    if choice.finish_reason == "length" and (whole := whole_sentences(choice.text)):
        return replace(choice, text=whole, reasoning=reasoning, finish_reason="stop")
    return replace(choice, reasoning=reasoning)


def whole_sentences(text: str) -> str:
    """Return a text up to the end of its last whole sentence; nothing where it has none.

    Example:
        >>> whole_sentences("It is so. And then")
        'It is so.'
    """
    return text[: max(text.rfind(mark) for mark in ".!?") + 1]
