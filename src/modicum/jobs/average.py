"""Average the checkpoints that a training run saved."""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from modicum.errors import CheckpointError
from modicum.jobs.loading.models import resolve_model
from modicum.recipe import Recipe, choice
from modicum.record import Run
from modicum.registry import averager, job

if TYPE_CHECKING:
    from modicum.weights.checkpoint import Checkpoint


class AverageRecipe(Recipe):
    """Checkpoints of one run, and how to average them."""

    job: Literal["average"] = "average"
    checkpoints: list[str] = Field(min_length=1, description="folders, oldest first; * stands for anything")
    method: choice(averager) = Field(default="uniform", validate_default=True)  # type: ignore[valid-type]
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="of the result")

    def inputs(self) -> Iterator[str]:
        """Yield the checkpoints."""
        yield from find_checkpoints(self.checkpoints)


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

    return [Checkpoint(path, resolve=resolve_model) for path in find_checkpoints(recipe.checkpoints)]


def plan(recipe: AverageRecipe) -> list[str]:
    """Describe what would be read and written."""
    from modicum.weights.average import choose_coefficients, plan_average

    checkpoints = open_checkpoints(recipe)
    coefficients = choose_coefficients(checkpoints, method=recipe.method.name, **recipe.method.knobs)
    told = [f"{c.name}: {w:.4g}" for c, w in zip(checkpoints, coefficients)]
    return [*plan_average(checkpoints, coefficients, dtype=recipe.dtype).describe(), *told]


@job("average", plan=plan, distributed=True)
def average(recipe: AverageRecipe, run: Run) -> None:
    """Average checkpoints of one run into a better model.

    Args:
        recipe: The checkpoints and the averager.
        run: Gets ``model/``, and each checkpoint's coefficient in its metrics.
    """
    from modicum.weights.average import choose_coefficients, plan_average
    from modicum.weights.merge import run_plan

    checkpoints = open_checkpoints(recipe)
    coefficients = choose_coefficients(checkpoints, method=recipe.method.name, seed=recipe.seed, **recipe.method.knobs)
    out = run.folder / "model"
    if out.exists() and run.main:
        shutil.rmtree(out)  # whole, but the run was killed before its record said so
    run_plan(plan_average(checkpoints, coefficients, dtype=recipe.dtype), out, progress=not run.quiet)
    run.record["metrics"] = {"coefficients": {c.name: w for c, w in zip(checkpoints, coefficients)}}
    run.output("model", out)
