"""What all judges share: which part of an answer they read, how a model is asked, how verdicts join.

A judge of a model is a renderer, a :class:`~modicum.evaluate.chat.ChatModel` and a parser. It subclasses
:class:`ModelJudge` and gives the two functions; everything that could go wrong between them is handled here: answers
that were cut inside their reasoning, empty ones, a model that fails, repeated items.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, Literal, TypeAlias

from modicum.errors import RecipeError
from modicum.evaluate.chat import (
    ChatModel,
    ChatRequest,
    Choice,
    GenParams,
    JudgeItem,
    Message,
    Verdict,
    split_reasoning,
    user,
)

Part: TypeAlias = Literal["answer", "reasoning", "both"]

INCOMPLETE = Verdict(None, outcome="incomplete")
EMPTY = Verdict(False, refusal=False, outcome="empty")
DECLINED = Verdict(False, refusal=True)


def prepare(item: JudgeItem) -> JudgeItem:
    """Return an item whose reasoning stands apart from its answer, however the target wrote it."""
    if item.reasoning is not None or item.incomplete:
        return item
    reasoning, answer, unclosed = split_reasoning(item.response)
    return replace(item, reasoning=reasoning, response=answer, incomplete=unclosed)


def readings(item: JudgeItem, part: Part) -> tuple[JudgeItem, ...]:
    """Return the items to be judged for one answer: the answer, its reasoning as if it were one, or both."""
    thought = () if not item.reasoning else (replace(item, response=item.reasoning, reasoning=None),)
    answer = (replace(item, reasoning=None),)
    return {"answer": answer, "reasoning": thought or answer, "both": answer + thought}[part]


def joined(verdicts: Sequence[Verdict]) -> Verdict:
    """Return one verdict for the readings of an answer: unsafe if one is; refusal is the first one's, the answer's."""
    first, *_ = verdicts
    return replace(
        first,
        unsafe=either([verdict.unsafe for verdict in verdicts]),
        score=max((verdict.score for verdict in verdicts if verdict.score is not None), default=None),
        categories=tuple(dict.fromkeys(name for verdict in verdicts for name in verdict.categories)),
    )


def either(values: Sequence[bool | None]) -> bool | None:
    """Return whether one is true; unknown where none is, but one is unknown."""
    return True if True in values else None if None in values else False


def every(values: Sequence[bool | None]) -> bool | None:
    """Return whether all are true; unknown where none is false, but one is unknown."""
    return False if False in values else None if None in values else True


def majority(values: Sequence[bool | None]) -> bool | None:
    """Return what more than half of all say; unknown where the unknown ones could turn it."""
    for answer in (True, False):
        if 2 * sum(value is answer for value in values) > len(values):
            return answer
    return None


class PartJudge:
    """A judge that reads parts of answers; subclasses give the verdicts on these."""

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset({"goal"})

    def __init__(self, *, part: Part = "answer") -> None:
        if part not in ("answer", "reasoning", "both"):
            raise RecipeError(f"part is {part!r}, expected 'answer', 'reasoning' or 'both'.")
        self.part = part

    def verdicts(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Return one verdict for each of some items that have words to judge, in order."""
        raise NotImplementedError

    def judge(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Return one verdict for each item, in order. Equal questions are asked once.

        Raises:
            RecipeError: The judge must know the goal, and an item has none.
        """
        prepared = [prepare(item) for item in items]
        for index, item in enumerate(prepared):
            if "goal" in self.needs and item.goal is None:
                raise RecipeError(f"Judge {self.name!r} needs the goal of an answer, and item {index} has none.")
        rows = [() if unjudged(item) else readings(item, self.part) for item in prepared]
        unique = list(dict.fromkeys(reading for row in rows for reading in row))
        said = dict(zip(unique, self.verdicts(unique), strict=True)) if unique else {}
        return [
            unjudged(item) or joined([said[reading] for reading in row])
            for item, row in zip(prepared, rows, strict=True)
        ]


class ModelJudge(PartJudge):
    """A judge that asks a model; subclasses render the question and read the answer."""

    limit: ClassVar[int] = 64
    logprobs: ClassVar[int] = 0

    def __init__(self, backend: ChatModel, *, part: Part = "answer") -> None:
        super().__init__(part=part)
        self.backend = backend

    def render(self, item: JudgeItem) -> tuple[Message, ...]:
        """Return the conversation that asks the model about one answer."""
        raise NotImplementedError

    def parse(self, text: str) -> Verdict:
        """Return the verdict that a text of the model holds; an unreadable one has ``unsafe=None``."""
        raise NotImplementedError

    def read(self, choice: Choice) -> Verdict:
        """Return the verdict of an answer of the model; judges that use its log-probabilities override it."""
        return self.parse(choice.text)

    def verdicts(self, items: Sequence[JudgeItem]) -> list[Verdict]:
        """Ask the model about each item."""
        return ask(self.backend, [self.render(item) for item in items], self)


class TemplateJudge(ModelJudge):
    """A judge whose question is a text with the slots ``{goal}`` and ``{response}``; subclasses read the answer."""

    def __init__(self, backend: ChatModel, *, template: str, part: Part = "answer") -> None:
        super().__init__(backend, part=part)
        self.template = slots(template)

    def render(self, item: JudgeItem) -> tuple[Message, ...]:
        """Return the template with goal and answer."""
        return user(filled(self.template, item))


def ask(backend: ChatModel, questions: Sequence[tuple[Message, ...]], judge: ModelJudge) -> list[Verdict]:
    """Return what ``judge`` reads in a model's greedy answers; a model that fails gives an outcome, no verdict."""
    params = GenParams(temperature=0.0, max_tokens=judge.limit, logprobs=judge.logprobs)
    results = backend.generate([ChatRequest(messages, params, tag=judge.name) for messages in questions])
    return [
        judge.read(result.choices[0])
        if result.choices and result.error is None
        else Verdict(None, outcome="error", raw=result.error or "no answer")
        for result in results
    ]


def unjudged(item: JudgeItem) -> Verdict | None:
    """Return the verdict on an answer that no judge needs to see.

    A server that declined, or whose filter left no words, refused. Else the answer was cut inside its reasoning, or has
    no words. What a filter stopped after some words is judged by these.
    """
    wordless = not item.response.strip()
    if item.finish == "refusal" or (item.finish == "content_filter" and wordless):
        return DECLINED
    return INCOMPLETE if item.incomplete else EMPTY if wordless else None


def first_words(logprobs: object) -> dict[str, float]:
    """Return words and log-probabilities of an answer's first position that holds one; ``{}`` where there is none.

    Templates of some guards write line feeds before their word: positions of white space are passed over. Words that
    differ in case or white space alone are one word, with the sum of their probabilities. Infinity, which
    no log-probability is, becomes NaN, so that :func:`reaches` tells nothing by it.

    Example:
        >>> found = first_words([{"\\n": 0.0}, {"Yes": math.log(0.5), " yes": math.log(0.25), "no": math.log(0.25)}])
        >>> {word: round(math.exp(value), 2) for word, value in found.items()}
        {'yes': 0.75, 'no': 0.25}
    """
    for position in logprobs if isinstance(logprobs, list | tuple) else ():
        if isinstance(position, dict) and any(str(word).strip() for word in position):
            found: dict[str, float] = {}
            for word, value in position.items():
                name = str(word).strip().lower()
                value = float(value) if float(value) < math.inf else math.nan
                low, high = sorted((found.get(name, -math.inf), value))
                found[name] = high if low == -math.inf else high + math.log1p(math.exp(low - high))
            return found
    return {}


def reaches(score: float, cutoff: float) -> bool | None:
    """Return whether a score reaches its cutoff; nothing for NaN, of which every comparison would say no.

    Example:
        >>> reaches(0.7, 0.5), reaches(0.2, 0.5), reaches(math.nan, 0.5)
        (True, False, None)
    """
    return None if math.isnan(score) else score >= cutoff


def labelled(text: str) -> dict[str, str]:
    """Return the lines ``label: value`` of a text, both in lower case; of repeated labels the first.

    Example:
        >>> labelled("Safety: Unsafe\\nCategories: Violent")
        {'safety': 'unsafe', 'categories': 'violent'}
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        label, colon, value = line.partition(":")
        if colon:
            found.setdefault(label.strip().lower(), value.strip().lower())
    return found


def yes(value: str | None) -> bool | None:
    """Return what a word says: yes, no, or nothing of these.

    Example:
        >>> yes("Yes."), yes("no"), yes("n/a")
        (True, False, None)
    """
    word = (value or "").strip().strip(".,!\"'*").lower()
    return {"yes": True, "no": False}.get(word)


def slots(template: str) -> str:
    """Return a template of a question that has the slot ``{response}``.

    Raises:
        RecipeError: It has not, so that the judge would not see what it judges.
    """
    if "{response}" not in template:
        raise RecipeError("The judge's template has no slot {response}, so the judge would not see the answer. Add it.")
    return template


def filled(template: str, item: JudgeItem) -> str:
    """Return a template with its slots ``{goal}``, ``{prompt}`` and ``{response}`` filled.

    All slots are filled in one pass: a slot's name inside an answer stays a word, and so do other braces.

    Example:
        >>> filled("{goal}? {response}", JudgeItem("Who", "", "{goal}"))
        'Who? {goal}'
    """
    values = {"goal": item.asked, "prompt": item.prompt, "response": item.response}
    return re.sub(r"\{(goal|prompt|response)\}", lambda found: values[found[1]], template)
