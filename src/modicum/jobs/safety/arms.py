"""The arms that safety reasoning is compared with, and the check that no evaluation prompt is trained on."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from modicum.errors import RecipeError
from modicum.evaluate.chat import ChatModel, ChatRequest, ChatResult, GenParams, split_reasoning, user
from modicum.jobs.safety.filters import Given, Query, Row, make_row, ngrams, normal, one_of, read_queries, spoken
from modicum.jobs.safety.prompts import completion_text
from modicum.random import derive_seed, generator

REFUSALS = (
    "I will not help with that, because it could hurt people.",
    "That is something I decline to do: it would cause harm.",
    "I can't take part in this. If there is a safe question behind it, please ask it.",
)


def build_rt_rows(
    illegal: Sequence[Given],
    helpful: Sequence[Given],
    *,
    refusal_source: Literal["teacher", "dataset", "template"] = "teacher",
    srg_rows: Sequence[Row] | None = None,
    teacher: ChatModel | None = None,
    seed: int = 0,
    max_tokens: int = 512,
) -> list[Row]:
    """Return rows of refusal training: a direct refusal of harmful requests, an ordinary answer to others.

    Args:
        illegal: Harmful requests, with ``completion`` where ``refusal_source`` is ``dataset``.
        helpful: Harmless requests with answers.
        refusal_source: ``teacher`` asks for one short refusal at temperature 0, ``dataset`` takes the data's safe
            answers, ``template`` draws from a few refusals of our own, for tests without a model.
        srg_rows: Rows of safety reasoning. Their prompts and answers are taken as they are, without the reasoning, so
            that the arms differ in nothing else. Rows that were made with ``final_answer="own"`` keep their prompts
            alone: ``refusal_source`` words the refusals of this arm.
        teacher: Whoever words refusals.
        seed: Draws the templates.
        max_tokens: Limit on a refusal.

    Raises:
        RecipeError: An answer or the teacher is missing.

    Example:
        >>> rows = build_rt_rows(["Do harm."], [("2 + 2", "4")], refusal_source="template")
        >>> [row["meta"]["kind"] for row in rows], rows[1]["answer"]
        (['illegal', 'helpful'], '4')

    Reference:
        H. Wang et al., 2025, arXiv:2502.04040, section on refusal training.
    """
    one_of(refusal_source, ("teacher", "dataset", "template"), "refusal_source")
    if srg_rows is not None:
        own = {
            row["meta"]["id"]: Query(row["meta"]["id"], row["prompt"][-1]["content"], True)
            for row in srg_rows
            if row["meta"].get("final_answer") == "own" and row["meta"]["kind"] == "illegal"
        }
        said = _refusals(list(own.values()), refusal_source, teacher, seed, max_tokens)
        answers: list[str] = [said.get(row["meta"]["id"], row["answer"]) or "" for row in srg_rows]
        return [
            {
                **row,
                "reasoning": None,
                "answer": answer,
                "completion": spoken(answer),
                "meta": {**row["meta"], "arm": "rt"},
            }
            for row, answer in zip(srg_rows, answers, strict=True)
        ]
    queries = read_queries(illegal, helpful)
    answers_of = {query.id: query.reference or "" for query in queries if not query.harmful}
    answers_of |= _refusals([query for query in queries if query.harmful], refusal_source, teacher, seed, max_tokens)
    _need_answers(answers_of)
    return [make_row(query, None, answers_of[query.id], {"arm": "rt"}) for query in queries]


def _refusals(
    harmful: Sequence[Query], source: str, teacher: ChatModel | None, seed: int, max_tokens: int
) -> dict[str, str]:
    """Return a refusal of each harmful request, by its id."""
    if not harmful:
        return {}
    if source == "teacher":
        if teacher is None:
            raise RecipeError("refusal_source is 'teacher', but there is no teacher. Give one, or take 'template'.")
        wish = "The request between the lines is harmful. Decline it in one short sentence that names what is declined."
        params = GenParams(temperature=0.0, max_tokens=max_tokens)
        requests = [ChatRequest(user(f"{wish}\n-----\n{query.text}\n-----"), params, tag=query.id) for query in harmful]
        said = [split_reasoning(result.choices[0].text)[1].strip() for result in draw(teacher, requests)]
    elif source == "dataset":
        said = [query.reference or "" for query in harmful]
    else:
        said = [REFUSALS[derive_seed(seed, "refusal", query.id) % len(REFUSALS)] for query in harmful]
    found = dict(zip((query.id for query in harmful), said, strict=True))
    _need_answers(found)
    return found


def _need_answers(answers: Mapping[str, str]) -> None:
    if empty := next((name for name, answer in answers.items() if not answer.strip()), None):
        raise RecipeError(f"Request {empty!r} has no answer. Give one, or another refusal_source.")


def build_filler_rows(
    srg_rows: Sequence[Row], *, filler: Literal["neutral", "shuffled"] = "neutral", seed: int
) -> list[Row]:
    """Return rows whose reasoning has as many words but says nothing about the request: the control of the format.

    Args:
        srg_rows: Rows of safety reasoning.
        filler: ``neutral`` repeats a sentence without content. ``shuffled`` gives each row the reasoning of another,
            repeated or cut to its own number of words.
        seed: Draws whose reasoning a row gets.

    Raises:
        RecipeError: ``shuffled`` with fewer than two rows that reason.

    Example:
        >>> row = {"prompt": [], "reasoning": "a b c", "answer": "4", "meta": {"id": "x"}}
        >>> build_filler_rows([row], seed=0)[0]["reasoning"]
        'Let me think'

    Reference:
        H. Wang et al., 2025, has no such control; it is ours.
    """
    one_of(filler, ("neutral", "shuffled"), "filler")
    thinking = [index for index, row in enumerate(srg_rows) if row["reasoning"]]
    donors = dict(zip(thinking, thinking, strict=True))
    if filler == "shuffled":
        if len(thinking) < 2:
            raise RecipeError(f"{len(thinking)} rows reason, expected two or more to exchange their reasoning.")
        import torch

        order = [thinking[i] for i in torch.randperm(len(thinking), generator=generator(seed, "filler")).tolist()]
        # A cycle through all rows in a drawn order: nobody gets its own.
        donors = dict(zip(order, [*order[1:], order[0]], strict=True))
    rows = []
    for index, row in enumerate(srg_rows):
        reasoning = row["reasoning"]
        if reasoning:
            source = (
                srg_rows[donors[index]]["reasoning"] if filler == "shuffled" else "Let me think about this for a while."
            )
            length, words = len(reasoning.split()), source.split()
            reasoning = " ".join((words * (length // len(words) + 1))[:length])
        completion = spoken(completion_text(reasoning, row["answer"]))
        meta = {**row["meta"], "arm": f"filler_{filler}"}
        rows.append({**row, "reasoning": reasoning, "completion": completion, "meta": meta})
    return rows


def decontaminate(
    rows: Sequence[Row],
    eval_sets: Mapping[str, Iterable[str]],
    *,
    ngram: int = 12,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """Refuse training rows that stand in an evaluation set, and name those that share words with one.

    Args:
        rows: Training rows.
        eval_sets: Names and prompts of evaluation sets.
        ngram: Words in a row that make an overlap.
        tell: Gets each line; when not given, it is warned of.

    Returns:
        A line for each overlapping row.

    Raises:
        RecipeError: A row's prompt is an evaluation prompt, but for case, punctuation and white space, or ``ngram`` is
            below 1.

    Example:
        >>> decontaminate([{"prompt": "Why is the sky blue?"}], {"test": ["Why is grass green?"]})
        []
    """
    if ngram < 1:
        raise RecipeError(f"ngram is {ngram}, expected 1 or more words in a row.")
    known: dict[str, str] = {}
    spans: dict[tuple[str, ...], str] = {}
    for name, prompts in eval_sets.items():
        for prompt in prompts:
            known.setdefault(normal(prompt), name)
            for span in ngrams(prompt, ngram):
                spans.setdefault(span, name)
    found = []
    for index, row in enumerate(rows):
        text = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        if (where := known.get(normal(text))) is not None:
            raise RecipeError(
                f"The prompt of training row {index} is one of the evaluation set {where!r}, so what is measured there "
                "would be memory. Take it out of one of them."
            )
        if shared := next((spans[span] for span in ngrams(text, ngram) if span in spans), None):
            found.append(f"Training row {index} shares {ngram} words in a row with evaluation set {shared!r}.")
    for line in found:
        if tell is None:
            warnings.warn(line, stacklevel=2)
        else:
            tell(line)
    return found


def draw(model: ChatModel, requests: Sequence[ChatRequest], *, attempts: int = 3) -> list[ChatResult]:
    """Return as many answers to each request as it asks for, asking again where a server ignores ``n``.

    Raises:
        RecipeError: The model fails, or still gives fewer after some attempts.
    """
    found = model.generate(requests)
    for attempt in range(attempts):
        short = [i for i, result in enumerate(found) if len(result.choices) < requests[i].params.n and not result.error]
        if not short:
            break
        again = []
        for i in short:
            got, params = len(found[i].choices), requests[i].params
            seed = None if params.seed is None else params.seed + got + 1000 * (attempt + 1)
            again.append(replace(requests[i], params=replace(params, n=params.n - got, seed=seed)))
        for i, more in zip(short, model.generate(again), strict=True):
            found[i] = replace(found[i], choices=(*found[i].choices, *more.choices), error=more.error)
    for request, result in zip(requests, found, strict=True):
        if result.error or len(result.choices) < request.params.n:
            said = result.error or f"gave {len(result.choices)} of {request.params.n} answers"
            raise RecipeError(f"{model.name} failed on request {request.tag or '?'!r}: {said}.")
    return [replace(result, choices=result.choices[: r.params.n]) for r, result in zip(requests, found, strict=True)]
