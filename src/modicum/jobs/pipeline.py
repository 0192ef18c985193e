"""Several jobs in one file, each able to name what an earlier one made.

``stage:NAME`` stands for the first output of stage ``NAME``, ``stage:NAME/OUTPUT`` for the output of that name. A
stage is a run of its own in ``stages/NAME``. Finished stages are skipped when the pipeline runs again; a stage whose
recipe or inputs changed is redone, with everything that depends on it: beside the finished one, which it replaces when
it is done itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from modicum import lock, registry
from modicum.errors import RecipeError, did_you_mean
from modicum.jobs import execute, open_run
from modicum.jobs import plan as plan_job
from modicum.recipe import Data, Recipe, parse
from modicum.record import Run, read_record
from modicum.registry import job

PREFIX = "stage:"


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
        for position, stage in enumerate(self.stages):
            name = stage.get("name")
            if not isinstance(name, str) or not name.replace("-", "").replace("_", "").isalnum():
                raise RecipeError(f"stages[{position}] needs a name of letters, digits, - and _; got {name!r}.")
            if name in seen:
                raise RecipeError(f"Two stages are called {name!r}. Rename one.")
            if stage.get("job") == "pipeline":
                raise RecipeError(f"stage {name!r} is a pipeline. Put its stages into this one.")
            parse(_without_name(stage, self.seed), f"stage {name!r}")
            for reference in _references(stage):
                target = reference.removeprefix(PREFIX).partition("+")[0].partition("/")[0]
                if target not in seen:
                    raise RecipeError(f"stage {name!r} uses {reference!r}, no earlier stage. {_earlier(target, seen)}")
            seen.append(name)
        return self

    def inputs(self) -> Iterator[str]:
        """Yield what the stages read from outside the pipeline."""
        for stage in self.stages:
            recipe = parse(_without_name(stage, self.seed))
            yield from (name for name in recipe.inputs() if not name.startswith(PREFIX))


def plan(recipe: PipelineRecipe) -> list[str]:
    """Describe each stage; what depends on an earlier stage's output can be told only after that stage ran."""
    lines = []
    for stage in recipe.stages:
        inner = parse(_without_name(stage, recipe.seed))
        uses = sorted({reference.removeprefix(PREFIX) for reference in _references(stage)})
        after = f" after {', '.join(uses)}" if uses else ""
        lines.append(f"{stage['name']}: {inner.job}{after}")
        if not uses:
            lines += [f"  {line}" for line in plan_job(inner)]
    return lines


def goes_on(stored: Mapping[str, Any], recipe: PipelineRecipe) -> bool:
    """Whether a stored recipe is an earlier form of this one: a pipeline with a stage in common."""
    stages = stored.get("stages")
    if stored.get("job") != "pipeline" or not isinstance(stages, list):
        return False
    names = {stage.get("name") for stage in stages if isinstance(stage, dict)}
    return any(stage["name"] in names for stage in recipe.stages)


@job("pipeline", plan=plan, incremental=goes_on)
def pipeline(recipe: PipelineRecipe, run: Run) -> None:
    """Run the stages in order; finished ones are skipped.

    Args:
        recipe: The stages.
        run: The pipeline's own folder; stage ``NAME`` becomes the run ``stages/NAME`` in it.
    """
    folders: dict[str, Path] = {}
    summaries: list[dict[str, Any]] = []
    seen = False  # the first process at work
    for position, stage in enumerate(recipe.stages, 1):
        name = stage["name"]
        folder = run.folder / "stages" / name
        resolved = _resolve(_without_name(stage, recipe.seed), folders)
        inner = parse(resolved, f"stage {name!r}")
        run.say(f"[{position}/{len(recipe.stages)}] {name}: {inner.job}")
        if run.main or registry.job[inner.job].facts.distributed:
            execute(inner, folder, quiet=run.quiet, on_change="replace")
        if not run.main:
            # A file is a barrier that needs no process group. The pipeline's lock, unlike the stage's, is held from the
            # first stage to the last: once it is gone, nobody will finish this one.
            # Neither another recipe's record counts, nor that of a failure: it may be an old one, mended since.
            first = open_run(inner, folder, quiet=True, on_change="keep")
            seen = lock.wait(first.finished, run.folder / lock.NAME, folder, seen=seen)
        folders[name] = folder
        record = read_record(folder)
        summaries.append(
            {"name": name, "job": inner.job, "folder": f"stages/{name}"}
            | {key: record[key] for key in ("status", "seconds")}
        )
        run.record["stages"] = summaries
        run.record["metrics"][name] = record["metrics"]
        run.save()


def _without_name(stage: Data, seed: int) -> Data:
    return {"seed": seed, **{key: value for key, value in stage.items() if key != "name"}}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str) and value.startswith(PREFIX):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _references(item)


def _resolve(value: Any, folders: dict[str, Path]) -> Any:
    """Replace every reference to a stage by the path of what that stage made."""
    if isinstance(value, dict):
        return {key: _resolve(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, folders) for item in value]
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return value
    value, plus, adapter = value.partition("+")  # model+adapter, as mergekit files write it
    if plus:
        return f"{_resolve(value, folders)}+{_resolve(adapter, folders)}"
    name, _, output = value.removeprefix(PREFIX).partition("/")
    outputs: dict[str, str] = read_record(folders[name])["outputs"]
    if not outputs:
        raise RecipeError(f"{value!r}: stage {name!r} made nothing that another stage could use.")
    if output and output not in outputs:
        raise RecipeError(f"{value!r}: stage {name!r} has no output {output!r}. {did_you_mean(output, outputs)}")
    return str(folders[name] / (outputs[output] if output else next(iter(outputs.values()))))


def _earlier(name: str, seen: list[str]) -> str:
    return did_you_mean(name, seen) if seen else "It is the first stage."
