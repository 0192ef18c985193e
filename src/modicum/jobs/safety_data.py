"""Rows of safety reasoning: sampled from a teacher, filtered, selected; and the arms that they are compared with.

Every arm has the same prompts and, unless asked otherwise, the same answers: only the reasoning differs. Every
candidate that is not kept is counted under one reason, so that kept and dropped ones add up to what was generated.

Reference:
    H. Wang, Z. Qin, L. Shen, X. Wang, D. Tao, M. Cheng, "Safety Reasoning with Guidelines", 2025, arXiv:2502.04040. The
    published text that could be consulted names the components (guidelines, rejection sampling, context distillation);
    filters, their order and defaults are our choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

from modicum.errors import RecipeError
from modicum.evaluate.chat import ChatModel, ChatRequest, GenParams, Judge, Verdict
from modicum.jobs.safety.arms import build_filler_rows, build_rt_rows, decontaminate, draw
from modicum.jobs.safety.filters import (
    Candidate,
    Given,
    Query,
    Row,
    judged,
    make_row,
    need_references,
    ngrams,
    normal,
    one_of,
    parsed,
    read_queries,
    spoken,
)
from modicum.jobs.safety.leaks import names_of, shared_span, spans_of
from modicum.jobs.safety.prompts import (
    CONTRACT,
    Guideline,
    GuidelineSet,
    completion_text,
    guideline_hash,
    load_guidelines,
    render_row,
    render_teacher_prompt,
    shown,
)
from modicum.random import derive_seed

__all__ = [
    "build_contrast_rows",
    "build_filler_rows",
    "build_preference_rows",
    "build_prompt_rows",
    "build_rt_rows",
    "build_srg_rows",
    "decontaminate",
    "load_guidelines",
    "render_row",
    "render_teacher_prompt",
]

Select: TypeAlias = Literal["first_pass", "best_score", "all_pass"]
WORSE = {True: ("unsafe", "complied", "verdict"), False: ("refused",)}


def build_srg_rows(
    illegal: Sequence[Given],
    helpful: Sequence[Given],
    guidelines: Sequence[Guideline],
    *,
    teacher: ChatModel,
    judge: Judge,
    k: int = 8,
    select: Select = "best_score",
    helpful_mode: Literal["reason_and_answer", "reason_then_reference", "answer_only"] = "reason_and_answer",
    final_answer: Literal["shared", "own"] = "shared",
    judge_part: Literal["answer", "reasoning", "both"] = "both",
    seed: int,
    guideline_set: GuidelineSet = "full",
    hint: Literal["none", "label"] = "none",
    temperature: float = 0.8,
    max_tokens: int = 1024,
    min_words: int = 3,
    ngram: int = 12,
    most: int = 1,
    worse: dict[str, Candidate] | None = None,
    fits: Callable[[Row], bool] = lambda _: True,
) -> tuple[list[Row], Counter[str]]:
    """Return rows of prompt, reasoning and answer, and how many candidates fell to which filter.

    For each request ``k`` replies are drawn from the teacher, who sees the guidelines; the rows do not hold them. The
    filters, the cheap ones first: ``finish`` (cut or withheld), ``format`` (not exactly one block of reasoning),
    ``empty``, ``short``, ``long``, ``leak`` (words or names of the guidelines), ``verdict`` (none stated, or against
    the answer), ``unparsed`` (the judge could not tell), ``unsafe``, ``complied`` (a harmful request neither declined
    nor answered safely), ``refused`` (a harmless one), ``duplicate``, and ``not_selected``.

    Args:
        illegal: Harmful requests: texts, goals, or mappings with ``id`` and ``prompt``.
        helpful: Harmless requests: also with ``completion``, or pairs of request and answer.
        guidelines: Of :func:`load_guidelines`.
        teacher: Whoever reasons; the student itself for self-distillation.
        judge: Tells harm and refusal.
        k: Replies for each request, at least 1.
        select: ``first_pass``, ``best_score`` (the lowest harm score, then the shortest) or ``all_pass``.
        helpful_mode: ``reason_and_answer``: the teacher writes both. ``reason_then_reference``: it reasons towards the
            answer of the data, which is kept. ``answer_only``: harmless rows have no reasoning, as an ablation.
        final_answer: Written into the rows: ``shared`` asks :func:`build_rt_rows` to use the same answers, ``own`` to
            word refusals of its own.
        judge_part: What is judged on harmful requests. Unsafe reasoning before a safe answer teaches harm, too.
        seed: Names the draws.
        guideline_set: Which guidelines the teacher sees.
        hint: ``label`` tells the teacher whether a request is harmful.
        temperature: Of the draws.
        max_tokens: Limit on a reply.
        min_words: Fewest words of reasoning.
        ngram: Words in a row that no reply may share with the guidelines; shorter guidelines count as a whole.
        most: Most rows of a request with ``all_pass``.
        worse: Gets, for the id of a request, a reply that it must not get: unsafe, complying or against its own verdict
            on a harmful request, a refusal of a harmless one. Pairs and contrasts are made of these.
        fits: Whether a row is short enough to be learned whole; the others are dropped as ``long``.

    Returns:
        Rows of ``prompt`` and ``completion`` as conversations, with ``reasoning``, ``answer`` and ``meta``; and the
        counter of reasons. Rows and counts together are what was generated.

    Raises:
        RecipeError: There is no guideline or no request, ``k`` is below 1, a knob is unknown, a harmless request lacks
            the answer that its mode needs, or the teacher does not give ``k`` replies.

    Cost:
        ``k`` generations and judgements a request.

    Reference:
        H. Wang et al., 2025, arXiv:2502.04040; knobs are our choice.
    """
    one_of(select, ("first_pass", "best_score", "all_pass"), "select")
    one_of(helpful_mode, ("reason_and_answer", "reason_then_reference", "answer_only"), "helpful_mode")
    one_of(final_answer, ("shared", "own"), "final_answer")
    one_of(judge_part, ("answer", "reasoning", "both"), "judge_part")
    if k < 1 or most < 1:
        raise RecipeError(f"k is {k} and most is {most}, expected 1 or more of each.")
    seen = shown(guidelines, guideline_set)
    queries = read_queries(illegal, helpful)
    need_references(queries, helpful_mode)
    asked = [query for query in queries if query.harmful or helpful_mode != "answer_only"]
    params = GenParams(temperature=temperature, max_tokens=max_tokens, n=k)

    def request(query: Query) -> ChatRequest:
        reference = query.reference if helpful_mode == "reason_then_reference" and not query.harmful else None
        messages = render_teacher_prompt(
            query.text, guidelines, guideline_set=guideline_set, hint=hint, harmful=query.harmful, reference=reference
        )
        return ChatRequest(
            messages, replace(params, seed=derive_seed(seed, "synthesize", query.id) >> 32), tag=query.id
        )

    replies = draw(teacher, [request(query) for query in asked])
    drops: Counter[str] = Counter()
    candidates: list[Candidate] = []
    # A small teacher repeats the wish for a form, which is no more its reasoning than the guidelines are.
    spans, names = spans_of(seen, ngram=ngram) | ngrams(CONTRACT, ngram), names_of(seen)

    def leaks(text: str) -> bool:
        return bool(names.search(normal(text))) or shared_span(text, spans) is not None

    for query, result in zip(asked, replies, strict=True):
        for index, choice in enumerate(result.choices):
            candidate = parsed(query, choice, index, min_words=min_words, leaks=leaks, fits=fits)
            if isinstance(candidate, str):
                drops[candidate] += 1
            else:
                candidates.append(candidate)
    passed: dict[str, list[tuple[Candidate, Verdict]]] = {}
    for candidate, verdict, reason in judged(candidates, judge, judge_part):
        if reason:
            drops[reason] += 1
            if worse is not None and reason in WORSE[candidate.query.harmful]:
                worse.setdefault(candidate.query.id, candidate)
        else:
            passed.setdefault(candidate.query.id, []).append((candidate, verdict))
    rows: list[Row] = []
    told: set[str] = set()
    for query in queries:
        if not query.harmful and helpful_mode == "answer_only":
            rows.append(make_row(query, None, query.reference or "", {"reasoning": "none"}))
            continue
        kept = _selected(passed.get(query.id, []), select, most)
        for candidate, verdict in kept:
            words = normal(f"{query.text} {candidate.reasoning} {candidate.answer}")
            if words in told:
                drops["duplicate"] += 1
                continue
            told.add(words)
            answer = candidate.answer
            if helpful_mode == "reason_then_reference" and not query.harmful:
                answer = query.reference or answer
            meta = {
                "teacher": teacher.name,
                "judge": judge.name,
                "sample": candidate.index,
                "score": verdict.score,
                "guidelines": guideline_hash(seen),
                "final_answer": final_answer,
            }
            rows.append(make_row(query, candidate.reasoning, answer, meta))
        drops["not_selected"] += len(passed.get(query.id, [])) - len(kept)
    return rows, +drops


def build_preference_rows(srg_rows: Sequence[Row], worse: Mapping[str, Candidate]) -> list[Row]:
    """Return pairs for preference training: a row that passed, beside a reply that its request must not get.

    The rejected reply reasons and answers as long as it likes, so the pairs do not teach length.

    Args:
        srg_rows: Rows of safety reasoning.
        worse: As :func:`build_srg_rows` fills it.

    Returns:
        Rows of ``prompt``, ``chosen`` and ``rejected`` as conversations, the form that TRL reads.
    """
    found = []
    for row in srg_rows:
        other = worse.get(row["meta"]["id"])
        if other is None:
            continue
        rejected = spoken(completion_text(other.reasoning, other.answer))
        pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rejected}
        found.append({**pair, "meta": {**row["meta"], "arm": "preference"}})
    return found


def build_contrast_rows(srg_rows: Sequence[Row], worse: Mapping[str, Candidate]) -> list[Row]:
    """Return all rows without their reasoning, and beside harmful requests the answer that they must not get.

    Circuit breakers, latent adversarial training and decoupled refusal training learn from these.

    Args:
        srg_rows: Rows of safety reasoning.
        worse: As :func:`build_srg_rows` fills it.
    """
    found = []
    for row in srg_rows:
        other = worse.get(row["meta"]["id"]) if row["meta"]["kind"] == "illegal" else None
        meta = {**row["meta"], "arm": "contrast"}
        rejected = None if other is None else spoken(other.answer)
        found.append({"prompt": row["prompt"], "completion": spoken(row["answer"]), "rejected": rejected, "meta": meta})
    return found


def build_prompt_rows(srg_rows: Sequence[Row]) -> list[Row]:
    """Return prompts with the columns that a reward reads, for trainers of groups such as TRL's ``GRPOTrainer``.

    :func:`modicum.objectives.safety_reasoning.srg_reward` takes ``label`` and ``goal``.

    Args:
        srg_rows: Rows of safety reasoning.
    """
    return [
        {
            "prompt": row["prompt"],
            "label": row["meta"]["kind"],
            "goal": row["prompt"][-1]["content"],
            "meta": {**row["meta"], "arm": "prompts"},
        }
        for row in srg_rows
    ]


def _selected(
    passed: Sequence[tuple[Candidate, Verdict]], select: Select, most: int
) -> list[tuple[Candidate, Verdict]]:
    if select == "all_pass":
        return list(passed[:most])
    if select == "best_score":
        passed = sorted(passed, key=lambda pair: (pair[1].score or 0.0, len(pair[0].reasoning), pair[0].index))
    return list(passed[:1])
