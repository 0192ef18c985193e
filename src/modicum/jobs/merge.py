"""Merge models: a recipe of our own, or a mergekit file as it is."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from pydantic import Field, model_validator

from modicum.errors import RecipeError
from modicum.jobs.models import resolve_model
from modicum.recipe import Recipe, choice
from modicum.record import Run
from modicum.registry import job, merge_method
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.plan import Plan, Step

Measured: TypeAlias = Mapping[str, Mapping[str, Any]]
EACH = ("ranks", "weights", "spectra", "energy_ranks", "outliers")  # of what is measured, a value for each expert
ALL = ("kept", "weakest", "interference", "survival", "cast_error")  # and one for the tensor
CLOSE = 0.05  # squared length of a direction beside the strongest, below which whitening magnifies noise


class MergeRecipe(Recipe):
    """A base, its experts and a method; or a mergekit document."""

    job: Literal["merge"] = "merge"
    base: str | None = Field(default=None, description="model that the experts were trained from")
    experts: list[str] = Field(default=[], description="folders, Hub ids or builtins; adapters are folded in")
    method: choice(merge_method) | None = None  # type: ignore[valid-type]
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="of the result")
    device: str = Field(default="cpu", description="where the arithmetic happens, for example cuda")
    shard_size: PositiveInt = Field(default=5_000_000_000, description="largest weight file, in bytes")
    diagnostics: bool = Field(
        default=False, description="also measure spectra, interference, outliers and what the cast loses; slower"
    )
    pickled: bool = Field(default=False, description="allow pytorch_model.bin, read with weights_only=True")

    mergekit: dict[str, Any] | None = Field(default=None, description="a mergekit file's content, in place of the rest")

    @model_validator(mode="after")
    def _complete(self) -> MergeRecipe:
        if self.mergekit is not None:
            if self.method is not None or self.experts or self.base:
                raise RecipeError("a mergekit file names base, models and method itself. Remove ours.")
            from modicum.weights.mergekit import read_slices

            read_slices(self.mergekit)
            return self
        if self.method is None:
            raise RecipeError("'method' is missing. Set it, for example {name: ties, density: 0.2}.")
        if not self.experts:
            raise RecipeError("'experts' is missing. List the models to merge.")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the models."""
        if self.mergekit is not None:
            from modicum.weights.mergekit import models_of

            yield from models_of(self.mergekit)
        yield from ([self.base] if self.base else [])
        yield from self.experts


def make_plan(recipe: MergeRecipe) -> Plan:
    """Open the models and decide what happens to each tensor; reads headers only."""
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.plan import plan_merge

    def opened(reference: str, adapter: str | None = None) -> Checkpoint:
        if adapter is not None:
            return Checkpoint(adapter, base=reference, resolve=resolve_model, pickled=recipe.pickled)
        return Checkpoint(reference, resolve=resolve_model, pickled=recipe.pickled)

    if recipe.mergekit is not None:
        from modicum.weights.mergekit import plan_mergekit

        plan = plan_mergekit(recipe.mergekit, opened)
    else:
        method: Any = recipe.method
        plan = plan_merge(
            opened(recipe.base) if recipe.base else None,
            [opened(expert) for expert in recipe.experts],
            method=method.name,
            knobs=method.knobs,
            dtype=recipe.dtype,
        )
    return plan.diagnosed() if recipe.diagnostics else plan


@job("merge", plan=lambda recipe: make_plan(recipe).describe(), distributed=True)
def merge(recipe: MergeRecipe, run: Run) -> None:
    """Merge models into one, a tensor at a time.

    Args:
        recipe: The models and the method.
        run: Gets ``model/``, and per-tensor figures in its metrics.
    """
    from modicum.weights.merge import run_plan

    plan = make_plan(recipe)
    for note in plan.notes:
        run.note(note)
    out = run.folder / "model"
    if out.exists() and run.main:
        shutil.rmtree(out)  # whole, but the run was killed before its record said so
    measured = run_plan(
        plan, out, seed=recipe.seed, device=recipe.device, shard_bytes=recipe.shard_size, progress=not run.quiet
    )
    if not run.main:
        return  # each process measured its own share; the first one has collected them all
    metrics = {"tensors": len(plan.steps), "memory_bound": plan.memory_bound(), "layers": layers(plan, measured)}
    if found := diagnostics(plan, measured):
        metrics["diagnostics"] = found
    run.record["metrics"] = metrics
    if warning := _uncertain(measured):
        run.note(warning)
    run.output("model", out)


def layers(plan: Plan, measured: Measured) -> dict[str, Any]:
    """Arrange what was measured: a list over tensors for each expert and each pair of experts."""
    steps, models = _comparable(plan, measured)
    rows = [measured[step.name] for step in steps]
    if not rows or len(rows[0]["norms"]) != len(models):
        return {}
    pairs = [f"{a}|{b}" for i, a in enumerate(models) for b in models[i + 1 :]]
    return {
        "names": [step.name for step in steps],
        "norms": {model: [_round(row["norms"][t]) for row in rows] for t, model in enumerate(models)},
        "cosines": {pair: [_round(row["cosines"][p]) for row in rows] for p, pair in enumerate(pairs)},
        "conflict": [_round(row["conflict"]) for row in rows],
    }


def diagnostics(plan: Plan, measured: Measured) -> dict[str, Any]:
    """Arrange what methods report and diagnostics add in the same way; nothing where there is none of it."""
    steps, models = _comparable(plan, measured)
    steps = [step for step in steps if any(key in measured[step.name] for key in (*EACH, *ALL))]
    rows = [measured[step.name] for step in steps]
    found: dict[str, Any] = {}
    for key in EACH:
        if any(key in row for row in rows):
            found[key] = {model: [_round(row[key][t]) if key in row else None for row in rows]
                          for t, model in enumerate(models)}  # fmt: skip
    for key in ALL:
        if any(key in row for row in rows):
            found[key] = [_round(row[key]) if key in row else None for row in rows]
    return {"names": [step.name for step in steps], **found} if found else {}


def _comparable(plan: Plan, measured: Measured) -> tuple[list[Step], list[str]]:
    """Return the steps whose experts most tensors share, as slices may have different ones, and the experts' names."""
    steps = [step for step in plan.steps if measured[step.name]]
    if not steps:
        return [], []
    experts = Counter(tuple(source.model for source in step.experts) for step in steps).most_common(1)[0][0]
    chosen = [step for step in steps if tuple(source.model for source in step.experts) == experts]
    return chosen, _short_names(list(experts))


def _uncertain(measured: Measured) -> str | None:
    """Say where experts are so close that what the method makes of them hangs on their small differences."""
    found = [row["weakest"] for row in measured.values() if "weakest" in row]
    close = [value for value in found if value < CLOSE]
    if not close:
        return None
    return (
        f"In {len(close)} of {len(found)} matrices, directions of the experts nearly coincide (least squared length "
        f"{min(close):.1g} of the largest), and making them orthogonal magnifies small differences. "
        f"whiten_rtol: {CLOSE} drops such directions; compare both on validation data."
    )


def _round(value: Any) -> Any:
    if isinstance(value, list):
        return [_round(one) for one in value]
    return value if isinstance(value, int) else float(f"{value:.5g}")


def _short_names(models: list[str]) -> list[str]:
    """Call each model by the end of its path, as much of it as tells them apart."""
    parts = [model.rstrip("/").split("/") for model in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{model} ({i + 1})" for i, model in enumerate(models)]
