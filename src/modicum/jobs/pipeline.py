"""Several jobs in one file, each able to name what an earlier one made.

``stage:NAME`` stands for the first output of stage ``NAME``, ``stage:NAME/OUTPUT`` for the output of that name. A
stage is a run of its own in ``stages/NAME``. Finished stages are skipped when the pipeline runs again; a stage whose
recipe or inputs changed is redone, with everything that depends on it: beside the finished one, which it replaces when
it is done itself. Stages run one after another; with ``--workers`` or ``--on``, those that do not use each other run
side by side (:mod:`modicum.jobs.executors`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from modicum import lock, processes, registry
from modicum.errors import ModicumError, RecipeError, did_you_mean
from modicum.jobs import execute, open_run
from modicum.jobs.stages.references import PREFIX, named, names_in, references, refuse_unmade, resolve, stage_of
from modicum.recipe import Data, Recipe, parse
from modicum.record import Run, read_record
from modicum.registry import job


class PipelineRecipe(Recipe):
    """A list of recipes that run in order."""

    job: Literal["pipeline"] = "pipeline"
    stages: list[Data] = Field(min_length=1, description="recipes, each with a `name` beside its `job`")

    @model_validator(mode="before")
    @classmethod
    def _from_documents(cls, data: object) -> object:
        """Make stages of several mergekit documents; what is set beside them holds for each."""
        if not isinstance(data, Mapping) or "documents" not in data:
            return data
        from modicum.weights.mergekit.several import stages_of

        own = {key: value for key, value in data.items() if key in ("job", "seed", "out")}
        shared = {key: value for key, value in data.items() if key not in (*own, "documents")}
        return own | {"stages": [shared | stage for stage in stages_of(data["documents"])]}

    @model_validator(mode="after")
    def _check_stages(self) -> PipelineRecipe:
        seen: list[str] = []
        made: dict[str, Sequence[str] | None] = {}
        for position, stage in enumerate(self.stages):
            name = stage.get("name")
            if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
                raise RecipeError(f"stages[{position}] needs a name of letters, digits, - and _; got {name!r}.")
            if name in seen:
                raise RecipeError(f"Two stages are called {name!r}. Rename one.")
            if stage.get("job") in ("pipeline", "grid"):
                raise RecipeError(f"stage {name!r} is a {stage['job']}. Put its stages into this one.")
            inner = parse(_without_name(stage, self.seed), f"stage {name!r}")
            for reference in references(stage):
                target = stage_of(reference)
                if target not in seen:
                    raise RecipeError(f"stage {name!r} uses {reference!r}, no earlier stage. {_earlier(target, seen)}")
                refuse_unmade(reference, made, f"stage {name!r}: ")
            seen.append(name)
            made[name] = registry.job[inner.job].facts.outputs(inner)
        return self

    def inputs(self) -> Iterator[str]:
        """Yield what the stages read from outside the pipeline."""
        for stage in self.stages:
            recipe = parse(_without_name(stage, self.seed))
            yield from (name for name in recipe.inputs() if not name.startswith(PREFIX))


def plan(recipe: PipelineRecipe, _folder: Path | None = None) -> list[str]:
    """Describe each stage; one that uses an earlier stage's output is checked on a model of the same shape."""
    from modicum.jobs.stages.foresight import foresee

    return foresee(_stages(recipe))


def goes_on(stored: Mapping[str, Any], recipe: PipelineRecipe) -> bool:
    """Whether a stored recipe is an earlier form of this one: a pipeline with a stage in common."""
    stages = stored.get("stages")
    if stored.get("job") != "pipeline" or not isinstance(stages, list):
        return False
    names = {stage.get("name") for stage in stages if isinstance(stage, dict)}
    return any(stage["name"] in names for stage in recipe.stages)


@job("pipeline", plan=plan, incremental=goes_on, spreads=True)
def pipeline(recipe: PipelineRecipe, run: Run) -> None:
    """Run the stages in order; finished ones are skipped.

    Args:
        recipe: The stages.
        run: The pipeline's own folder; stage ``NAME`` becomes the run ``stages/NAME`` in it.
    """
    if run.on is None and run.workers is None:
        _one_by_one(recipe, run)
        return
    if processes.world() > 1:
        raise RecipeError("--on and --workers start processes of their own: start the pipeline without torchrun.")
    from modicum.jobs.executors import opened
    from modicum.jobs.stages.running import Stage, run_stages

    records: dict[str, Mapping[str, Any]] = {}

    def tell(stage: Stage, record: Mapping[str, Any]) -> None:
        records[stage.name] = record
        for one in recipe.stages:  # in the order of the recipe, whichever is finished first
            if one["name"] in records:
                _keep(run, one["name"], records[one["name"]])

    with opened(run.on, run.workers, most=len(recipe.stages)) as executor:
        run_stages(_stages(recipe), run, executor, tell=tell)


def _one_by_one(recipe: PipelineRecipe, run: Run) -> None:
    folders: dict[str, Path] = {}
    seen = False  # the first process at work
    for position, stage in enumerate(recipe.stages, 1):
        name = stage["name"]
        folder = run.folder / "stages" / name
        resolved = resolve(_without_name(stage, recipe.seed), folders)
        inner = parse(resolved, f"stage {name!r}")
        run.say(f"[{position}/{len(recipe.stages)}] {name}: {inner.job}")
        if run.main or registry.job[inner.job].facts.distributed:
            try:
                execute(inner, folder, quiet=run.quiet, on_change="replace")
            except ModicumError as error:
                raise named(f"stage {name!r}", error) from None
        if not run.main:
            # A file is a barrier that needs no process group. The pipeline's lock, unlike the stage's, is held from the
            # first stage to the last: once it is gone, nobody will finish this one.
            # Neither another recipe's record counts, nor that of a failure: it may be an old one, mended since.
            first = open_run(inner, folder, quiet=True, on_change="keep")
            seen = lock.wait(first.finished, run.folder / lock.NAME, folder, seen=seen)
        folders[name] = folder
        if position == 1:
            run.record["stages"] = []
        _keep(run, name, read_record(folder))


def _keep(run: Run, name: str, record: Mapping[str, Any]) -> None:
    """Note in the pipeline's record what came of a stage."""
    summary = {"name": name, "job": record["job"], "folder": f"stages/{name}"}
    summary |= {key: record[key] for key in ("status", "seconds")}
    others = [one for one in run.record.get("stages", []) if one["name"] != name]
    run.record["stages"] = [*others, summary]
    run.record["metrics"][name] = record["metrics"]
    run.save()


def _stages(recipe: PipelineRecipe) -> list[Any]:
    from modicum.jobs.stages.running import Stage

    found = []
    for stage in recipe.stages:
        data = _without_name(stage, recipe.seed)
        found.append(Stage(stage["name"], data, stage["name"], after=tuple(names_in(data))))
    return found


def _without_name(stage: Data, seed: int) -> Data:
    return {"seed": seed, **{key: value for key, value in stage.items() if key != "name"}}


def _earlier(name: str, seen: list[str]) -> str:
    return did_you_mean(name, seen) if seen else "It is the first stage."
