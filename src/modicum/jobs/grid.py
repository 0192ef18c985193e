"""A grid: stages that are run for every combination of named values, and a table of what came of them.

::

    job: grid
    seeds: [0, 1, 2]
    axes:
      dimension:
        helpful: {data.path: "preference:instructions"}
        honest: {data.path: "preference:unanswerable"}
      method:
        tsv: {method.name: tsv}
        ties: {method.name: ties, method.density: 0.2, tune: {method.scale: [0.5, 1.0]}}
    choose:
      method: {by: validation}
    stages:
      - {name: expert, role: expert, over: [dimension], job: train, …}
      - {name: merged, role: merge, over: [method], job: merge, experts: ["stage:expert"], …}
      - {name: validation, over: [method], job: evaluate, models: {merged: "stage:merged"}, tasks: …}
      - {name: test, over: [method], job: evaluate, models: {merged: "stage:merged", expert: "stage:expert"}, tasks: …}

A stage is a recipe with further keys: ``name``; ``over``, the axes for whose values it is run; ``role`` (``expert``,
``merge``, ``mixture``, ``continual``, ``control`` or any word), which reports read; ``start``; ``resources``. It is run
for each seed, unless it has a ``seed`` of its own. A value of an axis sets paths in the recipes of the stages that are
over the axis and can have the path's first key; a path that begins with a stage's name is set in that one.

``stage:NAME`` stands for the cells of a stage at the same coordinates: one where the stage has the axes of the one that
uses it, several, in a list or among the names of models, where it has more. ``stage:NAME[AXIS=VALUE]`` fixes one; VALUE
is a name, ``first``, ``last`` or ``previous``, which is the cell before in the order of the axis, and before the first
the stage's ``start``. ``choose`` lets the scores of one stage decide among the ``tune`` variants of an axis, or among
its values: other stages get the best one.

A cell is a run. Its folder carries the hash of its recipe, so that a changed grid keeps the cells that it still has.
Several processes and machines may run one grid in one folder: each claims a cell before it works on it::

    grid/
      stages/STAGE-HASH/       the run of a cell
      cells/STAGE-HASH.json    {cell, stage, job, role, axes, folder, hash, outputs, metrics}
      grid.json                {grid: 1, axes: {NAME: [VALUE, …]}, seeds, cells: […], chosen: […], scores: […]}

Each of ``scores`` is one model on one task: ``{stage, cell, axes, arm, of, model, task, metric, better, unit, value,
low, high, n, items}``. ``of`` says what the model is: ``{cell, stage, role, axes}`` of the cell that made it, or
``{reference, role}`` of a model from elsewhere: ``base`` where trainings or merges start from it, else the evaluation's
``role``, or ``external``. ``arm`` is its name without seed and chosen knobs, or its name among ``models``; ``items`` is
the file with a line for each row, by which scores are paired. Each of ``chosen`` is ``{axis, at, value, cell, by,
scores: {VALUE: score}}``.
Neither kind of file tells times: a grid that was killed and went on ends with the same bytes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modicum import lock, processes, registry
from modicum.errors import RecipeError
from modicum.jobs.grids.cells import Plan
from modicum.jobs.grids.parts import Cell, Choice
from modicum.jobs.stages.foresight import finished_in, foresee, predicted
from modicum.jobs.stages.references import PREFIX, references, refuse_unmade, stage_of
from modicum.jobs.stages.taught import refuse_taught
from modicum.recipe import Data, Recipe, Section, parse
from modicum.record import Run
from modicum.registry import job
from modicum.types import NonNegativeInt

OFTEN = 5.0  # seconds between two writings of grid.json while cells finish


class Chosen(Section):
    """How a value of an axis, or a variant of its knobs, is chosen."""

    by: str = Field(description="stage of job evaluate whose scores decide")
    score: Literal["mean", "worst"] = Field(default="mean", description="over the tasks of that stage")
    task: str | None = Field(default=None, description="the one task that counts")
    across: list[str] = Field(default=[], description="axes, or seed, over which one choice holds: scores are averaged")


class GridRecipe(Recipe):
    """A template of stages, axes of overrides, and seeds."""

    job: Literal["grid"] = "grid"
    seeds: list[NonNegativeInt] = Field(
        default=[0], min_length=1, description="the seeds; every stage runs once for each"
    )
    axes: dict[str, Any] = Field(default={}, description="for each axis its values: {NAME: {path: value}}")
    choose: dict[str, Chosen] = Field(
        default={}, description="axes whose knobs or values are chosen, and by which stage"
    )
    stages: list[Data] = Field(min_length=1, description="recipes with a `name` and the axes that they are `over`")

    @field_validator("choose", mode="before")
    @classmethod
    def _stage_alone(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {axis: {"by": choice} if isinstance(choice, str) else choice for axis, choice in value.items()}

    @field_validator("seeds")
    @classmethod
    def _seeds_differ(cls, value: list[int]) -> list[int]:
        if len(set(value)) < len(value):
            raise ValueError(f"a seed stands twice in {value}. Drop one")
        return value

    @model_validator(mode="after")
    def _cells_fit(self) -> GridRecipe:
        made: dict[str, Sequence[str] | None] = {}
        for cell in self.plan.cells.values():
            inner = parse(dict(cell.recipe), f"cell {cell.title!r}")
            made[cell.name] = registry.job[inner.job].facts.outputs(inner)
        made |= {choice.name: made[choice.candidates[0]] for choice in self.plan.choices.values()}
        for cell in self.plan.cells.values():
            for reference in references(cell.recipe):
                try:
                    refuse_unmade(reference, made)
                except RecipeError as error:
                    name = stage_of(reference)
                    told = self.plan.cells[name].title if name in self.plan.cells else "that is chosen"
                    raise RecipeError(f"cell {cell.title!r}: {str(error).replace(name, told)}") from None
        return self

    @cached_property
    def plan(self) -> Plan:
        """All cells."""
        return Plan(self.stages, self.axes, self.seeds, self.choose)

    def inputs(self) -> Iterator[str]:
        """Yield what the cells read from outside the grid."""
        for cell in self.plan.cells.values():
            yield from (name for name in parse(dict(cell.recipe)).inputs() if not name.startswith(PREFIX))


def plan(recipe: GridRecipe, folder: Path | None = None) -> list[str]:
    """List the cells, what each would do, and how long the rest takes by those that are finished."""
    cells = recipe.plan.cells
    stages = _stages(recipe)
    lines = foresee(stages, detailed=False)
    refuse_taught(stages)
    counts = Counter(cell.recipe["job"] for cell in cells.values())
    told = ", ".join(f"{number} of job {name}" for name, number in counts.items())
    lines += [f"{len(cells)} cells: {told}; {len(recipe.plan.choices)} choices"]
    return lines + predicted({cell.name: cell.stage for cell in cells.values()}, folder)


def goes_on(stored: Mapping[str, Any], recipe: GridRecipe) -> bool:
    """Whether a stored recipe is an earlier form of this one: a grid with a stage in common."""
    stages = stored.get("stages")
    if stored.get("job") != "grid" or not isinstance(stages, list):
        return False
    names = {stage.get("name") for stage in stages if isinstance(stage, dict)}
    return any(stage["name"] in names for stage in recipe.stages)


@job("grid", plan=plan, incremental=goes_on, shared=True, spreads=True)
def grid(recipe: GridRecipe, run: Run) -> None:
    """Run every cell that is not finished, several at a time, and collect what came of all.

    Args:
        recipe: The template, axes and seeds.
        run: Gets ``stages/``, ``cells/`` and ``grid.json``.
    """
    if processes.world() > 1:
        raise RecipeError("A grid starts processes of its own (--workers). Start it without torchrun.")
    from modicum.jobs.executors import opened
    from modicum.jobs.grids.results import cell_json, grid_json, over_seeds, write_json
    from modicum.jobs.stages.running import run_stages

    cells = recipe.plan.cells
    folders: dict[str, Path] = {}
    summaries: dict[str, dict[str, Any]] = {}
    written = time.monotonic()

    def collect() -> dict[str, Any]:
        found = grid_json(recipe.plan, recipe.choose, folders)
        run.record["stages"] = [summaries[name] for name in cells if name in summaries]
        judges = [choice.by for choice in recipe.choose.values()]
        tasks = {name: template.recipe.get("tasks") or {} for name, template in recipe.plan.templates.items()}
        means = over_seeds(found["scores"], judges, tasks)
        run.record["metrics"] = {"cells": means, "chosen": found["chosen"]}
        write_json(run.folder / "grid.json", found)
        for file in (run.folder / "cells").glob("*.json"):
            if file.stem not in cells:  # of an earlier form of the grid; its run stays, and is known again
                file.unlink()
        run.save()
        return found

    def tell(stage: Any, record: Mapping[str, Any]) -> None:
        nonlocal written
        cell = cells[stage.name]
        folders[cell.name] = run.folder / "stages" / cell.name
        summaries[cell.name] = {"name": cell.title, "job": record["job"], "folder": f"stages/{cell.name}"} | {
            key: record[key] for key in ("status", "seconds")
        }
        if not run.main:
            return
        write_json(run.folder / "cells" / f"{cell.name}.json", cell_json(cell, record))
        if time.monotonic() - written > OFTEN:
            collect()
            written = time.monotonic()

    lock.check_exclusive(run.folder)
    run.folder = run.folder.resolve()  # cells name each other by paths, which every process must read alike
    stages = _stages(recipe)
    refuse_taught(stages, finished=finished_in(run.folder, cells))
    with opened(run.on, run.workers, most=len(cells)) as executor:
        try:
            run_stages(stages, run, executor, tell=tell, shared=True)
        finally:
            if run.main:
                collect()
                lock.remove_claims(run.folder / "stages")
    if run.main:
        run.output("grid", run.folder / "grid.json")
        run.output("cells", run.folder / "cells")


def _stages(recipe: GridRecipe) -> list[Any]:
    from modicum.jobs.grids.results import picked
    from modicum.jobs.stages.running import Stage

    def pick(choice: Choice, folders: Mapping[str, Path]) -> str:
        return picked(choice, recipe.choose[choice.axis], folders)[0]

    def of(cell: Cell) -> Stage:
        return Stage(cell.name, cell.recipe, cell.title, resources=cell.resources)

    found = [of(cell) for cell in recipe.plan.cells.values()]
    for choice in recipe.plan.choices.values():
        after = (*choice.candidates, *(name for names in choice.judges for name in names))
        title = f"choice of {choice.key}"
        found.append(Stage(choice.name, title=title, after=after, pick=partial(pick, choice)))
    if not found:
        raise RecipeError("The grid has no cells.")
    return found
