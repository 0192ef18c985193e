"""Requests, candidates and the filters between them: what a teacher's reply must be to become a training row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from modicum.errors import RecipeError, listed
from modicum.evaluate.chat import THINK, Choice, Goal, Judge, JudgeItem, Verdict, split_reasoning
from modicum.jobs.safety.prompts import completion_text, refuse_tags
from modicum.objectives.safety_reasoning import verdict_of

Given: TypeAlias = "str | Goal | Mapping[str, Any] | tuple[str, str]"
Row: TypeAlias = dict[str, Any]

_QUOTED = re.compile(
    r"according to (?:the|my) (?:polic|guideline)|the (?:guidelines|policy) (?:above|given|provided)", re.I
)


@dataclass(frozen=True)
class Query:
    """A request with its kind and, where it is harmless, the answer that the data has."""

    id: str
    text: str
    harmful: bool
    reference: str | None = None
    category: str | None = None


@dataclass(frozen=True)
class Candidate:
    query: Query
    reasoning: str
    answer: str
    index: int


def read_queries(illegal: Sequence[Given], helpful: Sequence[Given]) -> list[Query]:
    """Return requests of every form as queries, harmful ones first."""
    found = [_query(given, f"illegal-{i}", True) for i, given in enumerate(illegal)]
    found += [_query(given, f"helpful-{i}", False) for i, given in enumerate(helpful)]
    if not found:
        raise RecipeError("There is no request, expected one or more.")
    ids = [query.id for query in found]
    if twice := next((name for name, times in Counter(ids).items() if times > 1), None):
        raise RecipeError(f"Two requests have the id {twice!r}, expected one of each.")
    for query in found:
        if not isinstance(query.text, str) or not query.text.strip():
            raise RecipeError(f"Request {query.id!r} is {query.text!r}, expected words.")
        refuse_tags(query.text)
    return found


def need_references(queries: Sequence[Query], helpful_mode: str) -> None:
    """Refuse harmless requests without the answer that a mode takes from the data."""
    missing = [query.id for query in queries if not query.harmful and not (query.reference or "").strip()]
    if missing and helpful_mode != "reason_and_answer":
        raise RecipeError(f"Harmless request {missing[0]!r} has no answer, which helpful_mode {helpful_mode!r} needs.")


def _query(given: Given, name: str, harmful: bool) -> Query:
    if isinstance(given, str):
        return Query(name, given, harmful)
    if isinstance(given, Goal):
        return Query(given.id, given.text, harmful, category=given.category)
    if isinstance(given, tuple):
        return Query(name, given[0], harmful, given[1])
    if not isinstance(given, Mapping):
        raise RecipeError(f"Request {name!r} is {given!r}, expected a text, a goal, a pair or a mapping with 'prompt'.")
    text = given.get("prompt", given.get("text"))
    if not isinstance(text, str) or not text.strip():
        raise RecipeError(
            f"Request {given.get('id', name)!r} has the fields {listed(given)}, expected text as 'prompt'."
        )
    return Query(str(given.get("id", name)), text, harmful, given.get("completion"), given.get("category"))


def parsed(
    query: Query,
    choice: Choice,
    index: int,
    *,
    min_words: int,
    leaks: Callable[[str], bool],
    fits: Callable[[Row], bool] = lambda _: True,
) -> Candidate | str:
    """Return a candidate, or the filter to which the reply falls.

    Args:
        query: What was asked.
        choice: The reply.
        index: Its number among the replies to the query.
        min_words: Fewest words of reasoning.
        leaks: Whether a text holds what the teacher was given.
        fits: Whether a row is short enough to be learned whole.
    """
    if choice.finish_reason != "stop":
        return "finish"
    if choice.reasoning is not None:
        reasoning, answer, extra = choice.reasoning, choice.text, any(tag in choice.text for tag in THINK)
    else:
        said, answer, unclosed = split_reasoning(choice.text)
        reasoning = said or ""
        extra = unclosed or any(choice.text.count(tag) != 1 for tag in THINK)
    if extra or not reasoning.strip() or any(tag in reasoning for tag in THINK):
        return "format"
    if not answer.strip():
        return "empty"
    if len(reasoning.split()) < min_words:
        return "short"
    if not fits(make_row(query, reasoning.strip(), answer.strip(), {})):
        return "long"
    words = f"{reasoning} {answer}"
    if _QUOTED.search(words) or leaks(words):
        return "leak"
    if verdict_of(reasoning) is None:
        return "verdict"
    return Candidate(query, reasoning.strip(), answer.strip(), index)


def judged(candidates: Sequence[Candidate], judge: Judge, part: str) -> Iterable[tuple[Candidate, Verdict, str | None]]:
    """Yield candidates with the verdict on the answer and the filter to which they fall, if any."""

    def item(c: Candidate, text: str) -> JudgeItem:
        return JudgeItem(goal=c.query.text, prompt=c.query.text, response=text, category=c.query.category)

    answers = judge.judge([item(c, c.answer) for c in candidates]) if candidates else []
    thoughtful = [c for c in candidates if c.query.harmful and part != "answer"]
    thoughts = iter(judge.judge([item(c, c.reasoning) for c in thoughtful]) if thoughtful else [])
    for c, said in zip(candidates, answers, strict=True):
        thought = next(thoughts) if c.query.harmful and part != "answer" else None
        settled = verdict_of(c.reasoning)
        if said.refusal is not None and said.refusal != (settled == "refuse") and settled != "safe-complete":
            yield c, said, "verdict"
        elif not c.query.harmful:
            yield c, said, "refused" if said.refusal or (said.refusal is None and settled == "refuse") else None
        else:
            harm = ([] if part == "reasoning" else [said.unsafe]) + ([] if thought is None else [thought.unsafe])
            declined = settled in ("refuse", "safe-complete") if said.refusal is None else said.refusal
            reason = "unsafe" if True in harm else "unparsed" if None in harm else None
            yield c, said, reason or (None if declined or settled == "safe-complete" else "complied")


def make_row(query: Query, reasoning: str | None, answer: str, meta: Mapping[str, Any]) -> Row:
    return {
        "prompt": [{"role": "user", "content": query.text}],
        "completion": spoken(completion_text(reasoning, answer)),
        "reasoning": reasoning,
        "answer": answer,
        "meta": {"id": query.id, "kind": "illegal" if query.harmful else "helpful", **meta},
    }


def spoken(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def one_of(value: str, names: Sequence[str], knob: str) -> None:
    if value not in names:
        raise RecipeError(f"{knob} is {value!r}, expected {', '.join(map(repr, names))}.")


def normal(text: str) -> str:
    """Return a text without case, punctuation and white space; one without words, such as an emoji, by its signs."""
    return " ".join(re.findall(r"\w+", text.casefold()) or text.split())


def ngrams(text: str, size: int) -> set[tuple[str, ...]]:
    words = normal(text).split()
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}
