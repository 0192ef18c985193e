"""Search the knobs of a merge by what its result scores on validation data; one trial at most is written to the disk.

The first one is written and loaded, as a result may have other layers, tokens and numbers than the models. CMA-ES
proposes generations of points, each is merged into that model and measured, and the best is written at the end. Trials
are kept in the run's log: a killed search asks for the same points again and answers from there.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge
from pydantic import Field, model_validator

from modicum.durable import remove
from modicum.errors import RecipeError
from modicum.evaluate.rows import Rows
from modicum.jobs.evaluate import native_dtype, refuse_not_finite, usable_device
from modicum.jobs.loading.folders import note_code
from modicum.jobs.loading.models import load_model, load_tokenizer, rehearse_loading, skeleton
from modicum.jobs.merge import MergeRecipe, make_plan
from modicum.jobs.merge import described as card_of
from modicum.jobs.merging.in_place import InPlace, moves
from modicum.jobs.merging.space import Space, Span, described
from modicum.jobs.subject import LocalSubject, supplied
from modicum.jobs.task import Task
from modicum.recipe import Recipe
from modicum.record import Run, read_log
from modicum.registry import job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.plan import Plan

Scores = dict[str, float]


class SearchRecipe(Recipe):
    """A merge, the knobs that are searched, and what its result is measured by."""

    job: Literal["search"] = "search"
    merge: MergeRecipe = Field(description="a merge recipe, or a mergekit file's content; its knobs are the start")
    knobs: dict[str, Span] = Field(min_length=1, description="name of a knob: low, high, and log, each or layers")
    tasks: dict[str, Task] = Field(min_length=1, description="as in evaluate, on validation data")
    held_out: dict[str, Task] = Field(
        default={}, description="other data, on which the start and the best are measured at the end"
    )
    combine: Literal["mean", "minimum"] = Field(default="mean", description="of several tasks")
    trials: PositiveInt = Field(default=60, description="merges that are measured, the start among them")
    population: Annotated[int, Ge(4)] | None = Field(default=None, description="trials of a generation")
    spread: Annotated[float, Ge(0.01)] = Field(
        default=0.25, description="standard deviation of the first generation, as a share of each knob's range"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the measured model; auto: as in evaluate"
    )
    device: str = Field(
        default="auto",
        description="where merges are measured, for example cuda; auto: an accelerator where there is one",
    )

    @model_validator(mode="after")
    def _check(self) -> SearchRecipe:
        if self.merge.output == "lora":
            raise RecipeError("search measures whole models. Remove output: lora.")
        kinds = {task.measure.facts.better for task in self.tasks.values()}
        if len(kinds) > 1:
            raise RecipeError("tasks: of some the higher values are better, of others the lower. Search by one kind.")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the models and the data."""
        yield from self.merge.inputs()
        for task in (*self.tasks.values(), *self.held_out.values()):
            yield from task.inputs()


def cmaes() -> Any:
    """Return the library that searches.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        import cmaes as library
    except ImportError:
        raise RecipeError("search needs the package cmaes. Install it: pip install 'modicum[search]'.") from None
    return library


def make_space(recipe: SearchRecipe) -> Space:
    """Open the models, and return what is searched; reads headers only."""
    from modicum.weights.lora import LoraPlan

    cmaes()
    plan = make_plan(recipe.merge)
    assert not isinstance(plan, LoraPlan)  # noqa: S101 - refused by the recipe
    return Space(plan, recipe.knobs)


def plan(recipe: SearchRecipe) -> list[str]:
    """Describe the search; reads the data, and headers of the models."""
    space = make_space(recipe)
    first: Any = space.plan.models[0]
    options: dict[str, Any] = {"remote_code": recipe.merge.remote_code}
    model = rehearse_loading(first.base.folder, allow_pickle=recipe.merge.allow_pickle, **options)
    subject = LocalSubject("merge", model, load_tokenizer(first.base.folder, **options))
    _rehearse(space.plan)
    changing = sum(moves(step) for step in space.plan.steps)
    lines = [
        f"{len(space.names)} numbers: {', '.join(space.names)}",
        f"{recipe.trials} merges of {len(space.plan.steps)} tensors, {changing} of which are made anew each time, in "
        "memory",
    ]
    for kind, tasks in (("searched on", recipe.tasks), ("held out", recipe.held_out)):
        for name, task in tasks.items():
            rows = task.rows(recipe.seed)
            subject.rehearsed(task, rows, seed=recipe.seed, level=0.95)
            lines.append(f"{kind} {name}: {task.metric} of {len(rows)} rows ({task.data.path})")
    return [*lines, *space.plan.describe()]


def _rehearse(plan: Plan) -> None:
    """Refuse a merge whose class has no place for its tensors, as far as transformers knows the class."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in plan.companions.items():
            (Path(folder) / name).write_bytes(text)
        if (model := skeleton(Path(folder))) is not None:
            InPlace(model, plan)


@job("search", plan=plan, outputs=lambda _: ["model"])
def search(recipe: SearchRecipe, run: Run) -> None:
    """Search a merge's knobs, and write the best merge.

    Args:
        recipe: The merge, the knobs and the tasks.
        run: Gets ``model/``, the best merge; its metrics hold every trial, the best values and what held-out data says.
    """
    from modicum.weights.merge import run_plan

    space = make_space(recipe)
    run.inputs.check()
    note_code(space.plan.models, run)
    for note in space.plan.notes:
        run.note(note)
    measured = _Measured(recipe, run, space)
    trials = _search(recipe, space, measured, run)
    sign = 1 if _better(recipe) == "higher" else -1
    best = max(trials, key=lambda trial: sign * trial["value"])
    held = {}
    if recipe.held_out:
        for name, trial in (("start", trials[0]), ("best", best)):
            held[name] = measured.held_out(name, trial["shares"])
    measured.close()
    chosen = space.plan_at(best["shares"])
    run.record["metrics"] = {
        "best": {"value": best["value"], "knobs": space.values(best["shares"]), "scores": best["scores"]},
        "start": {"value": trials[0]["value"], "knobs": space.values(trials[0]["shares"])},
        "better": _better(recipe),
        "combine": recipe.combine,
        "trials": [{**space.values(t["shares"]), "value": t["value"], "scores": t["scores"]} for t in trials],
        "held_out": held,
    }
    run.say(f"best: {described(space.values(best['shares']))}")
    out = run.folder / "model"
    card = card_of(recipe.merge, chosen, run.folder)
    run_plan(
        replace(chosen, companions={**chosen.companions, **card}),
        out,
        shard_bytes=recipe.merge.shard_bytes,
        fork=False,
        progress=not run.quiet,
        replace=True,
    )
    run.output("model", out)


def _better(recipe: SearchRecipe) -> str:
    return next(iter(recipe.tasks.values())).measure.facts.better


def _search(recipe: SearchRecipe, space: Space, measured: _Measured, run: Run) -> list[dict[str, Any]]:
    """Measure the start, then generation after generation until the trials are spent."""
    import numpy as np

    n, sign = len(space.names), -1 if _better(recipe) == "higher" else 1
    start = space.start
    trials = [measured(0, start)]
    # Bounds are kept by the library, which draws again what lies outside; one number alone is searched beside a dummy.
    dimensions = max(2, n)
    optimizer = cmaes().CMA(
        mean=np.array([*start, *[0.5] * (dimensions - n)]).clip(0.01, 0.99),
        sigma=recipe.spread,
        bounds=np.array([[0.0, 1.0]] * dimensions),
        seed=recipe.seed,
        population_size=recipe.population,
    )
    while len(trials) < recipe.trials:
        generation = []
        for _ in range(optimizer.population_size):
            if len(trials) >= recipe.trials:
                return trials
            point = optimizer.ask()
            trials.append(measured(len(trials), point[:n].tolist()))
            generation.append((point, sign * trials[-1]["value"]))
        optimizer.tell(generation)
        if optimizer.should_stop():
            run.note(f"The search has converged after {len(trials)} of {recipe.trials} trials.")
            return trials
    return trials


class _Measured:
    """What merges score. The log of the run answers for trials that it holds."""

    def __init__(self, recipe: SearchRecipe, run: Run, space: Space) -> None:
        self.recipe, self.run, self.space = recipe, run, space
        lines = read_log(run.folder, "trial", trial=int, shares=list, value=float, scores=dict)
        self.known = {line["trial"]: line for line in lines}
        self.subject: LocalSubject | None = None
        self.rows: dict[int, Rows] = {}
        self.others = supplied(self._other)
        self.best = -math.inf

    def __call__(self, number: int, shares: Sequence[float]) -> dict[str, Any]:
        """Return a trial: its point, its value, and its score on each task."""
        stored = self.known.get(number)
        if stored is not None and stored["shares"] == list(shares):
            return stored
        scores = self._scores(self.space.plan_at(shares), self.recipe.tasks)
        value = sum(scores.values()) / len(scores)
        if self.recipe.combine == "minimum":
            value = min(scores.values()) if _better(self.recipe) == "higher" else max(scores.values())
        self.run.inputs.check_mapped()
        trial = {"trial": number, "shares": list(shares), "value": value, "scores": scores}
        self.run.log("trial", **trial)
        self.run.say(f"{number + 1}/{self.recipe.trials}: {value:.4g} at {described(self.space.values(shares))}")
        return trial

    def held_out(self, name: str, shares: Sequence[float]) -> dict[str, Any]:
        """Return the estimates of a point on the held-out tasks, with intervals."""
        found: dict[str, Any] = {}
        self._merge(self.space.plan_at(shares))
        for task_name, task in self.recipe.held_out.items():
            found[task_name] = self._estimate(name, task_name, task)
        return found

    def close(self) -> None:
        """Free the model."""
        self.subject = None

    def _scores(self, plan: Plan, tasks: Mapping[str, Task]) -> Scores:
        self._merge(plan)
        return {name: float(self._estimate("merge", name, task)["value"]) for name, task in tasks.items()}

    def _merge(self, plan: Plan) -> None:
        if self.subject is None:
            self._load(plan)
        self.place.merge(plan)
        self.run.inputs.check_mapped()

    def _load(self, plan: Plan) -> None:
        from modicum.weights.merge import run_plan

        merge, device, folder = self.recipe.merge, usable_device(self.recipe.device), self.run.folder / "trial"
        run_plan(plan, folder, shard_bytes=merge.shard_bytes, progress=False, replace=True)
        dtype = native_dtype(self.recipe.dtype, device)
        model = load_model(folder, dtype=dtype, device=device, remote_code=merge.remote_code).requires_grad_(False)
        self.subject = LocalSubject("merge", model, load_tokenizer(folder, remote_code=merge.remote_code))
        self.place = InPlace(model, self.space.plan)
        remove(folder)

    def _other(self, reference: str) -> LocalSubject:
        device, code = usable_device(self.recipe.device), self.recipe.merge.remote_code
        model = load_model(
            reference, dtype=native_dtype(self.recipe.dtype, device), device=device, remote_code=code
        ).requires_grad_(False)
        return LocalSubject("reference", model, load_tokenizer(reference, remote_code=code))

    def _estimate(self, label: str, name: str, task: Task) -> dict[str, Any]:
        if id(task) not in self.rows:
            self.rows[id(task)] = task.rows(self.recipe.seed, self.run.note)
            self.run.inputs.check()
        given = {**self.others, "seed": self.recipe.seed, "level": 0.95}
        items = task.ask(task.measure.function, self.rows[id(task)], self.subject, **given)
        found: dict[str, Any] = task.ask(task.measure.facts.estimate, items, **given)._asdict()
        refuse_not_finite(label, name, task.metric, found)
        return found
