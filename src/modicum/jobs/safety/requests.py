"""The requests that training data of safety reasoning are made of: which they are, and what rules them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError
from modicum.evaluate.chat import ChatRequest, GenParams, Goal, user
from modicum.jobs import attack_data
from modicum.jobs.chat.targets import Target, look_at, look_at_judge
from modicum.jobs.data import chat_template
from modicum.jobs.safety.filters import need_references, ngrams, read_queries
from modicum.jobs.safety.prompts import load_guidelines, render_teacher_prompt
from modicum.jobs.safety.suites import GoalSection, refuse_both

if TYPE_CHECKING:
    from modicum.jobs.synthesize import SynthesizeRecipe

WORDS = 12  # in a row, by which a wrapper is known


def requests_of(recipe: SynthesizeRecipe) -> tuple[list[Any], list[Any]]:
    """Return harmful and harmless requests, each with what its mode needs, and enough of them.

    Raises:
        RecipeError: A request is both, lacks the answer that its mode needs, or there are too few.
    """
    illegal, helpful = list(recipe.illegal.load(harmful=True)), recipe.helpful.pairs()
    queries = read_queries(illegal, helpful)
    refuse_both(*([Goal(q.id, q.text) for q in queries if q.harmful is harmful] for harmful in (True, False)))
    need_references(queries, recipe.helpful_mode)
    for kind, asked in (("illegal", illegal), ("helpful", helpful)):
        most = len(asked) * (recipe.most if recipe.select == "all_pass" else 1)
        if most < recipe.minimum:
            raise RecipeError(
                f"minimum asks for {recipe.minimum:g} rows of each kind, and {len(asked)} {kind} requests make at most "
                f"{most}. Lower it, or give more requests."
            )
    return illegal, helpful


def look_at_requests(recipe: SynthesizeRecipe, illegal: Sequence[Any], helpful: Sequence[Any]) -> None:
    """Refuse a teacher or judge that cannot be used, or not for these requests, and a limit under which no row is left.

    Raises:
        ModicumError: One of them cannot be used.
    """
    from modicum.jobs.loading.models import load_tokenizer

    queries, params = read_queries(illegal, helpful), GenParams(max_tokens=recipe.max_tokens)
    guidelines = load_guidelines(recipe.guidelines)
    prompts = [
        render_teacher_prompt(
            query.text, guidelines, guideline_set=recipe.guideline_set, hint=recipe.hint, harmful=query.harmful
        )
        for query in queries
    ]
    look_at(recipe.teacher, [ChatRequest(prompt, params) for prompt in prompts])
    look_at_judge(recipe.judge)
    reader = Target(model=recipe.student, remote_code=recipe.teacher.remote_code) if recipe.student else recipe.teacher
    if recipe.student is not None:
        look_at(reader)
    if reader.model is not None:
        tokenizer = load_tokenizer(reader.model, remote_code=reader.remote_code)
        shortest = chat_template.apply(tokenizer, user(min((query.text for query in queries), key=len)), prompt=True)
        if (length := len(tokenizer(shortest, add_special_tokens=False)["input_ids"])) >= recipe.max_length:
            raise RecipeError(
                f"max_length is {recipe.max_length}, and a row of the shortest request has more than {length} tokens: "
                "none would be left. Raise it."
            )


def refuse_evaluated(recipe: SynthesizeRecipe, requests: Sequence[Any]) -> dict[str, list[str]]:
    """Return the prompts that will be measured, after a check that no request is one or in a measured wrapper.

    Raises:
        RecipeError: One is.
    """
    from modicum.jobs.safety.arms import decontaminate

    tests = {
        section.path: [goal.text for goal in section.load(harmful=_is_harmful(section))]
        for section in recipe.evaluation
    }
    spans = {
        span: family
        for family in recipe.evaluation_wrappers
        for wrapper in attack_data.templates(family).values()
        for span in ngrams(wrapper, WORDS)
    }
    asked = [given.text if isinstance(given, Goal) else given["prompt"] for given in requests]
    decontaminate([{"prompt": text} for text in asked], tests, ngram=2**20)  # shared words are told of later
    for number, text in enumerate(asked):
        if shared := next((spans[span] for span in ngrams(text, WORDS) if span in spans), None):
            raise RecipeError(
                f"Request {number} holds {WORDS} words of a wrapper of {shared!r}, which is measured. Take it out, "
                "or measure another family."
            )
    return tests


def _is_harmful(section: GoalSection) -> bool:
    found = attack_data.goals(section.path)[:1] if section.path in attack_data.GOALS else []
    return found[0].harmful if found else True
