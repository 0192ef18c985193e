"""Lead a small teacher through the form of a reply: its reasoning first, the verdict of the data, then its answer.

A model of a hundred million parameters does not keep to a form by being asked. Its words are its own here; only the
tags, the first words of reasoning and of a refusal, and the line with the verdict are put into its mouth. What a limit
has cut is cut back to whole sentences. Rows made so say so in their provenance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from modicum.errors import RecipeError
from modicum.evaluate.chat import THINK, ChatModel, ChatRequest, ChatResult, Choice, Message
from modicum.jobs.safety.prompts import CONTRACT

VERDICTS: Mapping[bool, Literal["refuse", "comply"]] = {True: "refuse", False: "comply"}
THOUGHT = "The person asks for"  # how reasoning begins; a small model repeats the wish for a form otherwise
PART = 16  # replies that are made together
BEGUN = {True: "I can't help with that, because", False: ""}  # how an answer begins


class Steered:
    """A teacher whose replies have the form of the contract, and the verdict of the data.

    Args:
        inner: The teacher; it must continue an answer that is begun for it.
        harmful: Whether the request of a tag is harmful.
        reasoning_tokens: Limit on the reasoning.

    Raises:
        RecipeError: The teacher cannot continue an answer.

    Reference:
        "ThinkSafe", 2026, arXiv:2601.23143, steers a model's own traces by the label; H. Wang et al., 2025,
        arXiv:2505.20259, begin refusals for the model. The form is ours.
    """

    def __init__(self, inner: ChatModel, harmful: Mapping[str, bool], *, reasoning_tokens: int = 96) -> None:
        if "prefill" not in inner.caps:
            raise RecipeError(f"{inner.name} does not continue an answer that is begun for it. Set steer: false.")
        self.inner, self.harmful, self.reasoning_tokens = inner, harmful, reasoning_tokens
        self.name, self.caps = f"{inner.name}+steered", inner.caps

    def arriving(self, requests: Sequence[ChatRequest]) -> Iterator[list[tuple[int, ChatResult]]]:
        """Yield results with the numbers of their requests, some at a time, so that a kill costs few."""
        for start in range(0, len(requests), PART):
            yield list(enumerate(self.generate(requests[start : start + PART]), start))

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request in two steps."""
        # The form is put into its mouth, so the wish for one would only be repeated.
        requests = [replace(request, messages=_without_contract(request.messages)) for request in requests]
        opening, limit = f"{THINK[0]}\n{THOUGHT}", self.reasoning_tokens
        begun = [
            replace(request, prefill=opening, params=replace(request.params, max_tokens=limit)) for request in requests
        ]
        thoughts = self.inner.generate(begun)
        asked: list[ChatRequest] = []
        reasonings: list[tuple[str, str]] = []
        for request, result in zip(requests, thoughts, strict=True):
            for index, choice in enumerate(result.choices):
                reasonings.append((self._reasoning(choice, request.tag), BEGUN[self.harmful[request.tag]]))
                prefill = f"{THINK[0]}\n{reasonings[-1][0]}\n{THINK[1]}\n\n{reasonings[-1][1]}"
                asked.append(replace(request.single(index), prefill=prefill))
        answers = iter(zip(reasonings, self.inner.generate(asked) if asked else [], strict=True))
        found = []
        for result in thoughts:
            choices, error = [], result.error
            for _ in result.choices:
                (reasoning, begun_with), answer = next(answers)
                error = error or answer.error
                choices += [_finished(choice, reasoning, begun_with) for choice in answer.choices]
            found.append(ChatResult(tuple(choices), result.usage, error))
        return found

    def _reasoning(self, choice: Choice, tag: str) -> str:
        """Return whole sentences of the reasoning, with the verdict of the data as their last line."""
        said = THOUGHT + (choice.reasoning or choice.text).partition(THINK[1])[0]
        lines = [line for line in said.strip().splitlines() if not line.strip().lower().startswith("verdict")]
        text = "\n".join(lines).strip()
        if choice.finish_reason == "length":
            text = whole_sentences(text) or text
        return f"{text}\nVerdict: {VERDICTS[self.harmful[tag]]}"


def _without_contract(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    *first, last = messages
    return (*first, {"role": last["role"], "content": last["content"].replace(CONTRACT, "").rstrip()})


def _finished(choice: Choice, reasoning: str, begun_with: str) -> Choice:
    """Return an answer with its reasoning, cut back to whole sentences where a limit has cut it."""
    text = begun_with + choice.text
    if choice.finish_reason == "length" and (whole := whole_sentences(text)):
        return replace(choice, text=whole, reasoning=reasoning, finish_reason="stop")
    return replace(choice, text=text, reasoning=reasoning)


def whole_sentences(text: str) -> str:
    """Return a text up to the end of its last whole sentence; nothing where it has none.

    Example:
        >>> whole_sentences("It is so. And then")
        'It is so.'
    """
    return text[: max(text.rfind(mark) for mark in ".!?") + 1]
