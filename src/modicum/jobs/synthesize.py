"""Make training data of safety reasoning: a teacher reasons with guidelines, and filters keep what holds.

Every reply is stored as soon as it comes, so a run that was killed goes on with the next one. Rows and replies hold
requests that nobody should read by accident: they are stored compressed, never in clear.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import Field, model_validator

from modicum.durable import whole_file
from modicum.errors import ModicumError, RecipeError
from modicum.evaluate.chat import Goal
from modicum.jobs.chat.targets import JudgeSection, Target
from modicum.jobs.safety.prompts import GuidelineSet, load_guidelines, shown
from modicum.jobs.safety.requests import look_at_requests, refuse_evaluated, requests_of
from modicum.jobs.safety.suites import GoalSection
from modicum.recipe import Recipe
from modicum.record import Run
from modicum.registry import job
from modicum.types import NonNegative, PositiveInt

if TYPE_CHECKING:
    from modicum.evaluate.chat import ChatModel
    from modicum.jobs.safety.filters import Candidate, Row

Arm = Literal["srg", "rt", "helpful", "filler_neutral", "filler_shuffled", "preference", "contrast", "prompts"]


class SynthesizeRecipe(Recipe):
    """Which requests, which teacher, which filters, which arms."""

    job: Literal["synthesize"] = "synthesize"
    illegal: GoalSection = Field(default=GoalSection(path="adv_bench", size=32), description="harmful requests")
    helpful: GoalSection = Field(
        default=GoalSection(path="benign_expanded", size=32),
        description="harmless requests; rows of a file may hold the answer as `completion`",
    )
    evaluation: list[GoalSection] = Field(
        default=[], description="prompts that will be measured; a run that would train on one of them is refused"
    )
    evaluation_wrappers: list[str] = Field(
        default=[], description="families of wrappers that will be measured; a request that holds one is refused"
    )
    teacher: Target = Field(description="who reasons: a model or endpoint; the student itself for self-distillation")
    steer: bool = Field(
        default=False,
        description="give the teacher the form of the reply and the verdict of the data, for small models",
    )
    judge: JudgeSection = Field(default=JudgeSection(), description="who says whether a reply is safe")
    guidelines: str | None = Field(default=None, description="YAML file; the shipped guidelines when not given")
    guideline_set: GuidelineSet = Field(default="full", description="which guidelines the teacher sees")
    hint: Literal["none", "label"] = Field(default="none", description="label: tell the teacher what is harmful")
    k: PositiveInt = Field(default=8, description="replies for each request")
    select: Literal["first_pass", "best_score", "all_pass"] = Field(
        default="best_score",
        description="which replies that pass become rows: the first, the one of best score, or all",
    )
    most: PositiveInt = Field(default=1, description="rows of a request with all_pass")
    helpful_mode: Literal["reason_and_answer", "reason_then_reference", "answer_only"] = Field(
        default="reason_and_answer",
        description="on harmless requests: reason and answer, reason towards the answer of the data, or take "
        "that without reasoning",
    )
    judge_part: Literal["answer", "reasoning", "both"] = Field(
        default="both", description="what the judge reads of a reply to a harmful request"
    )
    final_answer: Literal["shared", "own"] = Field(
        default="shared", description="own: the arm rt declines in words of its own, and not in those of srg"
    )
    refusal_source: Literal["teacher", "template"] = Field(
        default="teacher", description="who words these: the teacher in one sentence, or a few fixed ones"
    )
    min_words: PositiveInt = Field(default=3, description="fewest words of reasoning")
    temperature: Annotated[float, Gt(0), Le(2)] = Field(default=0.8, description="of the teacher's replies")
    max_tokens: PositiveInt = Field(default=1024, description="limit on a reply")
    max_length: PositiveInt = Field(
        default=4096, description="most tokens of a row, prompt included; a longer one is left out of every arm"
    )
    student: str | None = Field(
        default=None, description="model whose tokenizer counts these; the teacher on this machine when not given"
    )
    arms: list[Arm] = Field(
        default=["srg", "rt", "filler_neutral"],
        min_length=1,
        description="kinds of training data to write, of the same requests",
    )
    format: Literal["text", "conversational"] = Field(
        default="text", description="prompt and completion as texts, or as lists of messages, which TRL reads"
    )
    minimum: NonNegative = Field(default=1, description="fewest rows of each kind without which the run is refused")

    @model_validator(mode="after")
    def _others_can_be_drawn(self) -> SynthesizeRecipe:
        if self.k == 1 and (needy := [arm for arm in self.arms if arm in ("preference", "contrast")]):
            raise ValueError(
                f"arm {needy[0]!r} needs a reply that a request must not get beside one that passed, and k: 1 draws "
                "one of each; raise k, or leave the arm out"
            )
        return self

    @model_validator(mode="after")
    def _can_be_steered(self) -> SynthesizeRecipe:
        if self.steer and self.teacher.endpoint is not None:
            raise ValueError(
                "steer: true begins the reply for the teacher, which no endpoint can be asked to go on with; set "
                "steer: false"
            )
        return self

    def inputs(self) -> Iterator[str]:
        """Yield models and files."""
        for goals in (self.illegal, self.helpful, *self.evaluation):
            yield from goals.inputs()
        yield from self.teacher.inputs()
        yield from self.judge.inputs()
        if self.guidelines is not None:
            yield self.guidelines
        if self.student is not None:
            yield self.student


def plan(recipe: SynthesizeRecipe) -> list[str]:
    """Say how many replies would be drawn; reads prompts and guidelines, but no model."""
    illegal, helpful = requests_of(recipe)
    refuse_evaluated(recipe, [*illegal, *helpful])
    look_at_requests(recipe, illegal, helpful)
    chosen = shown(load_guidelines(recipe.guidelines), recipe.guideline_set)
    return [
        f"{len(illegal)} harmful and {len(helpful)} harmless requests × {recipe.k} replies: "
        f"{_replies(recipe, illegal, helpful)} of at most {recipe.max_tokens} tokens"
        + (", each in two steps" if recipe.steer else ""),
        f"{len(chosen)} guidelines; judged by {recipe.judge.name}",
        f"arms: {', '.join(recipe.arms)}",
    ]


@job("synthesize", plan=plan, outputs=lambda recipe: recipe.arms)
def synthesize(recipe: SynthesizeRecipe, run: Run) -> None:
    """Draw reasoning from a teacher, filter it, and write the rows of every arm.

    Args:
        recipe: Requests, teacher, judge and arms.
        run: ``rows/ARM.parquet`` has the rows of each arm, for a train job or TRL; ``record.json`` counts what each
            filter dropped.
    """
    from modicum.jobs.chat.cache import Cached
    from modicum.jobs.chat.targets import open_judge, open_target, require_sampling
    from modicum.jobs.safety.drawing import teller
    from modicum.jobs.safety.steering import Steered
    from modicum.jobs.safety_data import build_srg_rows, decontaminate

    illegal, helpful = requests_of(recipe)
    tests = refuse_evaluated(recipe, [*illegal, *helpful])  # before a reply is drawn in vain
    look_at_requests(recipe, illegal, helpful)
    judge, errors = open_judge(recipe.judge)
    tell = teller(run, "replies of the teacher")
    teacher: Any = open_target(recipe.teacher, progress=tell, sampled=recipe.k > 1)
    if recipe.k > 1:
        require_sampling(teacher, "k: 1")
    kept: dict[str, Any] = {"revision": run.hash, "packed": True, "check": run.inputs.check_mapped}
    own = Cached(teacher, run.folder / "refusals.jsonl", **kept)  # of the arm rt, where asked
    if recipe.steer:
        # The names of tags are those that the rows get.
        tags = {_id(given, f"illegal-{i}"): True for i, given in enumerate(illegal)}
        tags |= {_id(given, f"helpful-{i}"): False for i, given in enumerate(helpful)}
        teacher = Steered(teacher, tags, reasoning_tokens=recipe.max_tokens)
    fits = _within(recipe, run)
    guidelines = load_guidelines(recipe.guidelines)
    run.inputs.check()
    cached = Cached(teacher, run.folder / "replies.jsonl", **kept)
    worse: dict[str, Candidate] = {}
    made, drops = build_srg_rows(
        illegal,
        helpful,
        guidelines,
        teacher=cached,
        judge=judge,
        k=recipe.k,
        select=recipe.select,
        most=recipe.most,
        helpful_mode=recipe.helpful_mode,
        judge_part=recipe.judge_part,
        final_answer=recipe.final_answer,
        guideline_set=recipe.guideline_set,
        hint=recipe.hint,
        temperature=recipe.temperature,
        max_tokens=recipe.max_tokens,
        min_words=recipe.min_words,
        seed=recipe.seed,
        worse=worse,
        fits=fits,
    )

    def arm_of(arm: Arm, rows: Sequence[Row]) -> Sequence[Row]:
        return _arm(arm, rows, worse, recipe, own)

    rows = _short_in_all(recipe, made, fits, arm_of)
    kinds, drawn = _kinds(rows), _kinds(rows, drawn=True)
    if lost := sum(_kinds(made, drawn=True).values()) - sum(drawn.values()):
        drops["long"] += lost
    run.record["metrics"] = {
        "synthesis": {
            "generated": _replies(recipe, illegal, helpful),
            "kept": drawn,
            "given": sum(kinds.values()) - sum(drawn.values()),  # rows of the data's own answers, which nobody drew
            "dropped": dict(sorted(drops.items())),
            "teacher": cached.name,
            "judge": errors,
        }
    }
    counts = ", ".join(f"{name} {count}" for name, count in drops.most_common())
    run.say(f"kept {kinds['illegal']} harmful and {kinds['helpful']} harmless rows; dropped: {counts or 'nothing'}")
    # Without any row there is nothing to learn from, whatever the minimum of each kind is.
    if lacking := [kind for kind, count in kinds.items() if count < recipe.minimum or not rows]:
        raise RecipeError(
            f"{kinds[lacking[0]]} {lacking[0]} rows are left after the filters ({counts}), expected "
            f"{max(1, recipe.minimum):g} or more. Take a stronger teacher, a larger k, steer: true or hint: label."
        )
    decontaminate(rows, tests, tell=run.note)
    run.inputs.check_mapped()
    folder = run.folder / "rows"
    folder.mkdir(exist_ok=True)
    for arm in recipe.arms:
        of_arm = arm_of(arm, rows)
        if not any(row.get("rejected") or arm not in ("preference", "contrast") for row in of_arm):
            raise RecipeError(
                f"Arm {arm!r} needs replies that a request must not get, and no request has one beside a row "
                "that passed. Raise k, or leave the arm out."
            )
        _write(folder / f"{arm}.parquet", of_arm, recipe.format)
        run.output(arm, folder / f"{arm}.parquet")


def _arm(
    arm: Arm, rows: Sequence[Row], worse: Mapping[str, Candidate], recipe: SynthesizeRecipe, teacher: ChatModel
) -> Sequence[Row]:
    """Return the rows of an arm, from those of safety reasoning."""
    from modicum.jobs import safety_data as made

    seed = recipe.seed

    def refusals() -> Sequence[Row]:
        return made.build_rt_rows(
            [], [], srg_rows=rows, refusal_source=recipe.refusal_source, teacher=teacher, seed=seed
        )

    build: Mapping[str, Callable[[], Sequence[Row]]] = {
        "srg": lambda: rows,
        "rt": refusals,
        "helpful": lambda: [row for row in refusals() if row["meta"]["kind"] == "helpful"],  # a control of best of N
        "filler_neutral": lambda: made.build_filler_rows(rows, filler="neutral", seed=seed),
        "filler_shuffled": lambda: made.build_filler_rows(rows, filler="shuffled", seed=seed),
        "preference": lambda: made.build_preference_rows(rows, worse),
        "contrast": lambda: made.build_contrast_rows(rows, worse),
        "prompts": lambda: made.build_prompt_rows(rows),
    }
    return build[arm]()


def _within(recipe: SynthesizeRecipe, run: Run) -> Callable[[Row], bool]:
    """Return whether a row is short enough for the student; any row is, where nobody can count its tokens."""
    from modicum.jobs.loading.models import load_tokenizer
    from modicum.jobs.safety.prompts import render_row

    reference = recipe.student or recipe.teacher.model
    if reference is None:
        run.note(
            "No tokenizer counts the tokens of rows, since the teacher is an endpoint. Name the model as `student`."
        )
        return lambda _: True
    tokenizer = load_tokenizer(reference, remote_code=recipe.teacher.remote_code)

    def fits(row: Row) -> bool:
        try:
            ids, _, _ = render_row(row, tokenizer, max_length=2**40)
        except ModicumError:
            return True  # whoever trains on it says what is wrong with it
        return len(ids) <= recipe.max_length

    return fits


def _short_in_all(
    recipe: SynthesizeRecipe,
    rows: list[Row],
    fits: Callable[[Row], bool],
    arm_of: Callable[[Arm, Sequence[Row]], Sequence[Row]],
) -> list[Row]:
    """Return the rows that are short enough in every arm: what one arm cannot learn, no other one does.

    Reasoning is exchanged among the rows that are left, so that a row may become too long once another one has gone.
    """
    alike = [arm for arm in recipe.arms if arm in ("srg", "rt", "filler_neutral", "filler_shuffled")]
    while True:
        if sum(bool(row["reasoning"]) for row in rows) < 2:  # nothing to exchange, which that arm tells of
            alike = [arm for arm in alike if arm != "filler_shuffled"]
        arms = [arm_of(arm, rows) for arm in alike]
        kept = [row for row, *others in zip(rows, *arms, strict=True) if all(map(fits, others))]
        if len(kept) == len(rows):
            return rows
        rows = kept


def _kinds(rows: Sequence[Row], *, drawn: bool = False) -> dict[str, int]:
    """Count harmful and harmless rows; ``drawn`` leaves out those whose answer is the data's and without reasoning."""
    counted = [row["meta"]["kind"] for row in rows if not drawn or "sample" in row["meta"]]
    return {kind: counted.count(kind) for kind in ("illegal", "helpful")}


def _replies(recipe: SynthesizeRecipe, illegal: Sequence[Any], helpful: Sequence[Any]) -> int:
    """Return how many replies are drawn."""
    return recipe.k * (len(illegal) + len(helpful) * (recipe.helpful_mode != "answer_only"))


def _id(given: Any, name: str) -> str:
    return given.id if isinstance(given, Goal) else str(given.get("id", name))


def _write(path: Any, rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Write rows as a table whose words are compressed, and whose header holds none of them."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    def told(row: Mapping[str, Any], field: str) -> Any:
        value = row[field]
        return value[-1]["content"] if form == "text" and isinstance(value, list) else value

    spoken = ("prompt", "completion", "chosen", "rejected", "reasoning", "answer", "label", "goal")
    table = pyarrow.Table.from_pylist(
        [
            {
                **{field: told(row, field) for field in spoken if field in row},
                "id": row["meta"]["id"],
                "kind": row["meta"]["kind"],
                "meta": json.dumps(row["meta"], sort_keys=True, ensure_ascii=False),
            }
            for row in rows
        ]
    )
    # Deflate codes every letter; zstd stores what is short as it stands.
    with whole_file(path) as partial:
        pyarrow.parquet.write_table(table, partial, compression="gzip", write_statistics=False)
