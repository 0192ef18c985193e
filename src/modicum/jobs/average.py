"""Average the checkpoints that a training run saved."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modicum import lock
from modicum.borders import read_json
from modicum.durable import write_atomic
from modicum.errors import CheckpointError
from modicum.jobs.data.section import DataSection
from modicum.jobs.loading.folders import note_code
from modicum.recipe import Recipe, choice
from modicum.record import Run
from modicum.registry import averager, job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.average import Choice
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.search import Landscape


class AverageRecipe(Recipe):
    """Checkpoints of one run, and how to average them."""

    job: Literal["average"] = "average"
    checkpoints: list[str] = Field(min_length=1, description="folders, oldest first; * stands for anything")
    method: choice(averager) = Field(default="uniform", validate_default=True)  # type: ignore[valid-type]
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="of the result")
    exclude: str | None = Field(
        default=None, description="regular expression of tensor names that stay as they are in the last checkpoint"
    )
    data: DataSection | None = Field(default=None, description="for averagers that learn: what their loss is of")
    held_out: DataSection | None = Field(default=None, description="what a learnt choice is judged by; else data is")
    batch_size: PositiveInt = 8
    fallback: bool = Field(
        default=True, description="take the plain mean of as many of the latest where a learnt choice is no better"
    )
    device: str = Field(default="cpu", description="where the arithmetic happens, for example cuda")
    allow_pickle: bool = Field(default=False, description="allow pytorch_model.bin, read with weights_only=True")
    remote_code: bool = Field(default=False, description="fetch and carry the code that comes with a model")

    @model_validator(mode="after")
    def _data_is_given_where_it_is_used(self) -> AverageRecipe:
        from modicum.weights.average import check_request

        method: Any = self.method
        check_request(len(self.checkpoints), method.name, learning=self.data is not None)
        if self.held_out is not None and self.data is None:
            raise ValueError("held_out judges what was learnt from data, and data is not given")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the checkpoints and the data."""
        yield from find_checkpoints(self.checkpoints)
        for section in filter(None, (self.data, self.held_out)):
            yield from section.inputs()


def find_checkpoints(patterns: list[str]) -> list[str]:
    """Return the folders that ``patterns`` stand for; those of one pattern in the order of the numbers in their names.

    Raises:
        CheckpointError: A pattern matches nothing.
    """
    found: list[str] = []
    for pattern in patterns:
        if not glob.has_magic(pattern):
            found.append(pattern)
            continue
        matches = [path for path in glob.glob(str(Path(pattern).expanduser())) if Path(path).is_dir()]  # noqa: PTH207
        if not matches:
            raise CheckpointError(f"No folder matches {pattern}. Check the path, and that the run saved checkpoints.")
        found += sorted(matches, key=lambda path: ([int(n) for n in re.findall(r"\d+", Path(path).name)], path))
    return found


def open_checkpoints(recipe: AverageRecipe) -> list[Checkpoint]:
    """Open the checkpoints; reads headers only."""
    from modicum.weights.checkpoint import Checkpoint

    found = find_checkpoints(recipe.checkpoints)
    return [Checkpoint(path, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code) for path in found]


def plan(recipe: AverageRecipe) -> list[str]:
    """Describe what would be read and written; an averager that learns is not asked, as that is the job's work."""
    from modicum.jobs.data.packing_trial import foresee_batches
    from modicum.jobs.data.rows import load_rows
    from modicum.weights.average import choose, plan_average

    checkpoints = open_checkpoints(recipe)
    if recipe.data is None:
        coefficients = choose(
            checkpoints, method=recipe.method.name, seed=recipe.seed, **recipe.method.knobs
        ).coefficients
        told = [f"{c.name}: {w:.4g}" for c, w in zip(checkpoints, coefficients)]
    else:
        coefficients = [1 / len(checkpoints)] * len(checkpoints)
        rows = load_rows(recipe.data, seed=recipe.seed)
        told = [f"{recipe.method.name} learns the coefficients from {len(rows)} rows of {recipe.data.path}"]
        told += foresee_batches(recipe.data, rows, checkpoints[-1].name)
    shape = plan_average(checkpoints, coefficients, dtype=recipe.dtype, exclude=recipe.exclude, device=recipe.device)
    return [*shape.describe(), *told]


@job("average", plan=plan, distributed=True)
def average(recipe: AverageRecipe, run: Run) -> None:
    """Average checkpoints of one run into a better model.

    Args:
        recipe: The checkpoints and the averager.
        run: Gets ``model/``, and each checkpoint's coefficient in its metrics.
    """
    from modicum.weights.average import plan_average
    from modicum.weights.merge import run_plan

    checkpoints = open_checkpoints(recipe)
    note_code(checkpoints, run)
    chosen = decide(recipe, checkpoints, run)
    if chosen.note:
        run.note(chosen.note)
    plan = plan_average(
        checkpoints, chosen.coefficients, dtype=recipe.dtype, exclude=recipe.exclude, device=recipe.device
    )
    run.inputs.check()
    out = run.folder / "model"
    run_plan(plan, out, progress=not run.quiet, replace=True)
    run.record["metrics"] = {"coefficients": {c.name: w for c, w in zip(checkpoints, chosen.coefficients)}}
    if chosen.scores:
        run.record["metrics"]["loss"] = chosen.scores
    run.output("model", out)


def decide(recipe: AverageRecipe, checkpoints: Sequence[Checkpoint], run: Run) -> Choice:
    """Return the coefficients; what was learnt is kept in the run's folder.

    The other processes of a launch take what the first one learnt: sums that differ in their last bits would make them
    write other models. And a run that was killed afterwards need not search again.
    """
    from modicum.weights.average import Choice, choose

    wanted: dict[str, Any] = {"method": recipe.method.name, "seed": recipe.seed, **recipe.method.knobs}
    if recipe.data is None:
        return choose(checkpoints, **wanted)
    path = run.folder / "choice.json"

    def known() -> Choice | None:
        found = read_json(path, str(run.folder), "Delete it and run again.") if path.exists() else {}
        return Choice(**found["choice"]) if found.get("hash") == run.hash else None

    if not run.main:
        lock.wait(lambda: known() is not None, run.folder / lock.NAME, path)
    if (choice := known()) is None:
        landscape = make_landscape(recipe, checkpoints, run.note)
        choice = choose(checkpoints, landscape=landscape, fallback=recipe.fallback, **wanted)
        write_atomic(path, json.dumps({"hash": run.hash, "choice": asdict(choice)}, indent=2) + "\n")
    return choice


def make_landscape(recipe: AverageRecipe, checkpoints: Sequence[Checkpoint], note: Callable[[str], None]) -> Landscape:
    """Return the language modelling loss of a mean of the checkpoints on the recipe's data."""
    import torch

    from modicum.jobs.data.batches import load_batches
    from modicum.jobs.loading.models import load_model, load_tokenizer
    from modicum.weights.search import Landscape

    reference = checkpoints[-1].name
    tokenizer = load_tokenizer(reference)
    model = load_model(reference, dtype="float32", device=recipe.device, allow_pickle=recipe.allow_pickle)
    # Its weights are only a place to put means in: they need no gradients of their own.
    model = getattr(model, "merge_and_unload", lambda: model)().requires_grad_(False)
    options: dict[str, Any] = {"batch_size": recipe.batch_size, "seed": recipe.seed, "note": note, "model": model}
    batches, held_out = (
        load_batches(section, tokenizer, **options) if section else None for section in (recipe.data, recipe.held_out)
    )

    def loss(weights: dict[str, torch.Tensor], batch: dict[str, Any]) -> torch.Tensor:
        batch = {key: value.to(recipe.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        mean: torch.Tensor = torch.func.functional_call(model, weights, kwargs=batch).loss
        return mean

    return Landscape(loss, checkpoints, batches or (), held_out, recipe.exclude, recipe.device)
