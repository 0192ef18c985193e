"""Take a LoRA adapter out of a fine-tuned model and its base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field

from modicum.jobs.card import CARD, model_card
from modicum.jobs.loading.folders import note_code
from modicum.jobs.loading.models import linear_modules, skeleton
from modicum.recipe import Recipe, dump
from modicum.record import Run
from modicum.registry import job
from modicum.types import Fraction, PositiveInt

if TYPE_CHECKING:
    from modicum.weights.extract import Extraction


class ExtractRecipe(Recipe):
    """Two models, and how much of their difference the adapter may hold."""

    job: Literal["extract"] = "extract"
    model: str = Field(description="the fine-tuned model: a folder, Hub id or builtin")
    base: str = Field(description="what it was trained from")
    max_rank: PositiveInt = Field(default=32, description="largest rank of a module")
    energy: Fraction | None = Field(
        default=None, description="take the smallest rank that holds this share of a difference's squared norm"
    )
    exclude: str | None = Field(
        default=None, description="regular expression of tensor names that stay as they are in the base"
    )
    save_rest: bool = Field(default=False, description="also store norms and embeddings that changed, whole")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="of the factors")
    allow_pickle: bool = Field(default=False, description="allow pytorch_model.bin, read with weights_only=True")
    remote_code: bool = Field(default=False, description="fetch the code that comes with a model")

    def inputs(self) -> Iterator[str]:
        """Yield the two models."""
        yield from (self.model, self.base)


def make_plan(recipe: ExtractRecipe) -> Extraction:
    """Open the models and decide what is compared; reads headers only."""
    from modicum.weights.adapter import name_in
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.extract import plan_extraction

    options: dict[str, Any] = {"allow_pickle": recipe.allow_pickle, "remote_code": recipe.remote_code}
    tuned, origin = (Checkpoint(reference, **options) for reference in (recipe.model, recipe.base))
    model = skeleton(origin.base.folder)
    if model is None:
        return plan_extraction(tuned, origin, exclude=recipe.exclude)
    known, tensors = set(linear_modules(model)), set(model.state_dict())
    find = name_in(tensors)

    def called(module: str) -> str | None:
        found = find(f"{module}.weight").removesuffix(".weight")
        return found if found in known else None

    def placed(name: str) -> str | None:
        return found if (found := find(name)) in tensors else None

    return plan_extraction(tuned, origin, exclude=recipe.exclude, modules=called, tensors=placed)


def notes(plan: Extraction) -> list[str]:
    """Say which tensors no adapter of transformers' class can change."""
    if not plan.homeless:
        return []
    return [
        f"{len(plan.homeless)} tensors, such as {plan.homeless[0]!r}, have no place of their own in the class of "
        "transformers and stay as they are in the base"
    ]


def describe(recipe: ExtractRecipe) -> list[str]:
    """Return the plan in words, a line each."""
    from modicum.weights.extract import check_different

    plan = make_plan(recipe)
    check_different(plan)
    sizes = [plan.origin.spec(name).shape for name in plan.matrices]
    size = sum(sum(shape) * min(recipe.max_rank, *shape) for shape in sizes) * getattr(torch, recipe.dtype).itemsize
    return [
        f"{len(sizes)} matrices of {plan.tuned.name} beside those of {plan.origin.name}",
        f"writes an adapter of rank {recipe.max_rank} and {size / 1e6:.0f} MB at most",
        *notes(plan),
    ]


@job("extract", plan=describe, outputs=lambda _: ["adapter"])
def extract(recipe: ExtractRecipe, run: Run) -> None:
    """Write the LoRA adapter that comes closest to what distinguishes a model from its base.

    Args:
        recipe: The models and the rank.
        run: Gets ``adapter/``, and each module's rank and share of its difference in its metrics.
    """
    from modicum.weights.extract import left_out, run_extraction

    plan = make_plan(recipe)
    run.inputs.check()
    note_code([plan.tuned, plan.origin], run)
    for note in notes(plan):
        run.note(note)
    lost = [] if recipe.save_rest else left_out(plan)
    if lost:
        run.note(
            f"{len(lost)} tensors that have no low-rank form or no module differ too, such as {lost[0]!r}, and stay as "
            "they are in the base; save_rest: true stores those without a low-rank form whole"
        )
    card = model_card(
        {model.name: [model.folder] for model in (plan.origin, plan.tuned)},
        base=recipe.base,
        method="LoRA extraction",
        recipe={key: value for key, value in dump(recipe).items() if key != "out"},
        said={},
        adapter=True,
    )
    found = run_extraction(
        plan,
        run.folder / "adapter",
        max_rank=recipe.max_rank,
        energy=recipe.energy,
        save_rest=recipe.save_rest,
        dtype=getattr(torch, recipe.dtype),
        progress=not run.quiet,
        replace=True,
        companions={CARD: card},
    )
    run.record["metrics"] = {
        "modules": len(found),
        "rank": max((one.rank for one in found), default=0),
        "energy": sum(one.energy for one in found) / max(1, len(found)),
        "ranks": {one.module: one.rank for one in found},
        "energies": {one.module: float(f"{one.energy:.5g}") for one in found},
    }
    run.output("adapter", run.folder / "adapter")
