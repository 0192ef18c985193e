"""Average the checkpoints that a training run saved."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from modicum import processes
from modicum.borders import read_json
from modicum.durable import write_atomic
from modicum.errors import CheckpointError
from modicum.jobs.averaging.folders import find_checkpoints, note_on_folders
from modicum.jobs.data.section import DataSection
from modicum.jobs.loading.folders import note_code
from modicum.recipe import Recipe, Section, choice
from modicum.record import Run
from modicum.registry import averager, job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.average import Choice
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.search import Landscape


class CurveSection(Section):
    """The loss of a rolling mean along the run: what a decay of the rate would give at each checkpoint."""

    last: PositiveInt = Field(description="checkpoints of the mean")


class AverageRecipe(Recipe):
    """Checkpoints of one run, and how to average them."""

    acts_with: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("held_out", "batch_size", "fallback", "compare", "curve"), "data"
    )
    job: Literal["average"] = "average"
    checkpoints: list[str] = Field(
        min_length=1,
        description="folders, oldest first; * stands for anything, a run's folder alone for all checkpoints in it",
    )
    method: choice(averager) = Field(default="uniform", validate_default=True, description="the rule of averaging")  # type: ignore[valid-type]
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="of the result")
    exclude: str | None = Field(
        default=None, description="regular expression of tensor names that stay as they are in the last checkpoint"
    )
    data: DataSection | None = Field(default=None, description="whose loss is searched and measured")
    held_out: DataSection | None = Field(default=None, description="what choices are judged by; else data is")
    batch_size: PositiveInt = Field(default=8, description="rows at a time where losses are measured")
    fallback: bool | Literal["tuned"] = Field(
        default=True,
        description="take the plain mean of as many of the latest where a learnt choice is worse; tuned: of any number",
    )
    compare: list[choice(averager)] = Field(  # type: ignore[valid-type]
        default_factory=list, description="rules that are measured beside the choice"
    )
    curve: CurveSection | None = Field(default=None, description="measure a rolling mean along the run")
    output: Literal["model", "lora"] = Field(default="model", description="lora: an adapter, of checkpoints that are")
    rank: PositiveInt | None = Field(default=None, description="of output: lora; the sum of all ranks when not given")
    device: str = Field(default="cpu", description="where the arithmetic happens, for example cuda")
    allow_pickle: bool = Field(default=False, description="allow pytorch_model.bin, read with weights_only=True")
    remote_code: bool = Field(default=False, description="fetch and carry the code that comes with a model")

    @model_validator(mode="after")
    def _data_is_given_where_it_is_used(self) -> AverageRecipe:
        from modicum.weights.average import check_request

        method: Any = self.method
        check_request(len(self.checkpoints), method.name, learning=self.data is not None)
        if self.rank is not None and self.output != "lora":
            raise ValueError("rank is that of an adapter. Set output: lora, or remove rank.")
        if self.exclude is not None and self.output == "lora":
            raise ValueError("exclude leaves tensors of a model as they are. Set output: model, or remove exclude.")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the checkpoints and the data."""
        yield from find_checkpoints(self.checkpoints)
        for section in filter(None, (self.data, self.held_out)):
            yield from section.inputs()


def open_checkpoints(recipe: AverageRecipe) -> list[Checkpoint]:
    """Open the checkpoints; reads headers only. The newest one's class says which of their tensors are no weights."""
    from modicum.jobs.loading.models import skeleton
    from modicum.weights.checkpoint import Checkpoint

    found = find_checkpoints(recipe.checkpoints)
    opened = [Checkpoint(path, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code) for path in found]
    if (model := skeleton(opened[-1].base.folder)) is not None:
        opened[-1].buffers = frozenset(name for name, _ in model.named_buffers())
    return opened


def plan(recipe: AverageRecipe) -> list[str]:
    """Describe what would be read and written; an averager that learns is not asked, as that is the job's work."""
    from modicum.jobs.averaging.overlap import note_on_overlap
    from modicum.jobs.data.packing_trial import foresee_batches
    from modicum.jobs.data.rows import load_rows
    from modicum.jobs.loading.models import rehearse_model
    from modicum.weights.average import choose

    checkpoints = open_checkpoints(recipe)
    n, method = len(checkpoints), recipe.method
    told = []
    for rule in (method, *recipe.compare):
        _check_number(rule, n)
    if recipe.curve is not None and recipe.curve.last > n:
        raise CheckpointError(f"curve.last is {recipe.curve.last}, but there are {n} checkpoints. Lower it.")
    if averager[method.name].facts.learns:
        coefficients = [1 / n] * n
    else:
        coefficients = choose(checkpoints, method=method.name, seed=recipe.seed, **method.knobs).coefficients
        told = [f"{c.name}: {w:.4g}" for c, w in zip(checkpoints, coefficients)]
    lines = [*note_on_folders(recipe.checkpoints), *_result(recipe, checkpoints, coefficients).describe()]
    if recipe.data is not None:
        options: dict[str, Any] = {"remote_code": recipe.remote_code}
        model = rehearse_model(checkpoints[-1].base.folder, allow_pickle=recipe.allow_pickle, **options)
        sections = [section for section in (recipe.data, recipe.held_out) if section is not None]
        read = [load_rows(section, seed=recipe.seed) for section in sections]
        lines += note_on_overlap(*read) if len(read) == 2 else []
        batches = [math.ceil(len(rows) / recipe.batch_size) for rows in read]
        if averager[method.name].facts.learns:
            lines.append(f"{method.name} learns the coefficients from {len(read[0])} rows of {recipe.data.path}")
        lines += _work(recipe, checkpoints, batches[0], batches[-1])
        for section, rows in zip(sections, read):
            lines += foresee_batches(section, rows, checkpoints[-1].name, model=model, **options)
    return [*lines, *told]


def _check_number(rule: Any, n: int) -> None:
    """Refuse knobs that ask for more checkpoints than there are; a rule is asked, of one that learns K is compared."""
    from modicum.weights.average import choose
    from modicum.weights.averagers.support import check_k

    if not averager[rule.name].facts.learns:
        choose(range(n), method=rule.name, **rule.knobs)
        return
    for knob in ("k", "most"):
        if isinstance(wanted := rule.knobs.get(knob), int):
            check_k(rule.name, wanted, n, knob=knob)


def _work(recipe: AverageRecipe, checkpoints: Sequence[Checkpoint], batches: int, held: int) -> list[str]:
    """Say how many passes over a batch the searches and measurements take, and what they hold in memory."""
    n, gradients = len(checkpoints), 0
    least = most = held * (n + 2 + len(recipe.compare) + (n - recipe.curve.last + 1 if recipe.curve else 0))
    for rule in (recipe.method, *recipe.compare):
        work = averager[rule.name].facts.work
        more = work(n, batches, **rule.knobs) if work else (0, 0, 0)
        gradients, least, most = gradients + more[0], least + more[1], most + more[2]
    values = f"{least} to {most}" if most > least else str(least)
    newest = checkpoints[-1]
    size = 4 * sum(newest.spec(name).numel for name in newest) / 1e9
    passes = f"about {gradients} forward and backward passes and {values} forward passes of {recipe.batch_size} rows"
    if not gradients:
        passes = f"about {values} forward passes of {recipe.batch_size} rows"
    held_at_once = f"a mean and its gradient, {2 * size:.2f} GB" if gradients else f"a mean, {size:.2f} GB"
    return [f"{passes}, each on a mean of the checkpoints", f"holds {held_at_once}, and one batch's activations"]


@job(
    "average",
    plan=plan,
    distributed=True,
    outputs=lambda recipe: ["adapter" if recipe.output == "lora" else "model"],
)
def average(recipe: AverageRecipe, run: Run) -> None:
    """Average checkpoints of one run into a better model.

    Args:
        recipe: The checkpoints and the averager.
        run: Gets ``model/`` or ``adapter/``, and in its metrics each checkpoint's coefficient and what was measured.
    """
    from modicum.weights.averageable import check_unused
    from modicum.weights.lora_mean import LoraMean, run_lora_mean
    from modicum.weights.merge import run_plan

    checkpoints = open_checkpoints(recipe)
    note_code(checkpoints, run)
    # Shapes, names and architectures are compared before anything is searched.
    _result(recipe, checkpoints, [1 / len(checkpoints)] * len(checkpoints))
    for line in note_on_folders(recipe.checkpoints):
        run.note(line)
    chosen, measured = decide(recipe, checkpoints, run)
    if not averager[recipe.method.name].facts.learns:  # a search has looked at all
        check_unused(checkpoints, chosen.coefficients)
    if chosen.note:
        run.note(chosen.note)
    result = _result(recipe, checkpoints, chosen.coefficients)
    run.inputs.check()
    name = "adapter" if recipe.output == "lora" else "model"
    out = run.folder / name
    if isinstance(result, LoraMean):
        run_lora_mean(result, out, dtype=recipe.dtype, progress=not run.quiet, replace=True)
    else:
        run_plan(result, out, progress=not run.quiet, replace=True)
    run.record["metrics"] = {"coefficients": {c.name: w for c, w in zip(checkpoints, chosen.coefficients)}}
    if chosen.scores:
        run.record["metrics"]["loss"] = chosen.scores
    if measured:
        searched = {"method": recipe.method.name, "passes": chosen.passes, "trace": chosen.trace}
        run.record["metrics"]["averaging"] = searched | measured
    run.output(name, out)


def _result(recipe: AverageRecipe, checkpoints: Sequence[Checkpoint], coefficients: Sequence[float]) -> Any:
    """Return the plan of what is written."""
    from modicum.weights.average import plan_average
    from modicum.weights.lora_mean import plan_lora_mean

    if recipe.output == "lora":
        return plan_lora_mean(checkpoints, coefficients, rank=recipe.rank)
    return plan_average(checkpoints, coefficients, dtype=recipe.dtype, exclude=recipe.exclude, device=recipe.device)


def decide(recipe: AverageRecipe, checkpoints: Sequence[Checkpoint], run: Run) -> tuple[Choice, dict[str, Any]]:
    """Return the coefficients, and what was measured beside them.

    Every answer of the loss is kept in the run's folder while the search lasts, so that a run which was killed goes on
    where it was; the choice is kept in their place. The processes of a launch search together.
    """
    from modicum.weights.average import Choice, choose

    method: Any = recipe.method
    wanted: dict[str, Any] = {"method": method.name, "seed": recipe.seed, **method.knobs}
    if recipe.data is None:
        return choose(checkpoints, **wanted), {}
    from modicum.jobs.averaging.loss import connected
    from modicum.jobs.averaging.measure import measure
    from modicum.jobs.averaging.overlap import note_on_overlap
    from modicum.jobs.data.rows import load_rows
    from modicum.weights.journal import Journal

    both = [load_rows(s, seed=recipe.seed) for s in (recipe.data, recipe.held_out) if s and recipe.held_out]
    overlap = note_on_overlap(*both) if both else []
    for line in overlap:
        run.note(line)
    path, answers = run.folder / "choice.json", run.folder / "search.jsonl"
    with connected():
        found = read_json(path, str(run.folder), "Delete it and run again.") if run.main and path.exists() else {}
        found = processes.broadcast_object(found)
        if found.get("hash") != run.hash:
            journal = Journal(answers, run.hash, check=run.inputs.check_mapped)
            landscape = make_landscape(recipe, checkpoints, run, journal)
            run.inputs.check()
            choice = choose(checkpoints, landscape=landscape, fallback=recipe.fallback, **wanted)
            found = {"hash": run.hash, "choice": asdict(choice), "measured": measure(recipe, landscape, choice)}
            run.inputs.check_mapped()
            if overlap:
                found["measured"]["measured_on"] = "held_out and data"
            if run.main:
                write_atomic(path, json.dumps(found, indent=2) + "\n")
                answers.unlink(missing_ok=True)
    return Choice(**found["choice"]), found.get("measured", {})


def make_landscape(
    recipe: AverageRecipe, checkpoints: Sequence[Checkpoint], run: Run, journal: Any = None
) -> Landscape:
    """Return the language modelling loss of a mean of the checkpoints on the recipe's data."""
    from modicum.jobs.averaging import loss

    return loss.make_landscape(recipe, checkpoints, run.note, journal=journal)
