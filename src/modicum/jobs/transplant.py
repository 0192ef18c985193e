"""Give a model the tokenizer of another, without training: what mergekit's tokensurgeon does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from modicum.jobs.card import CARD, beside, model_card
from modicum.jobs.loading.folders import note_code
from modicum.recipe import Recipe, dump
from modicum.record import Run
from modicum.registry import job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.weights.transplant import Found


class TransplantRecipe(Recipe):
    """A model, and the model whose tokenizer it gets."""

    job: Literal["transplant"] = "transplant"
    model: str = Field(description="the model: a folder, Hub id or builtin")
    donor: str = Field(description="the model whose tokenizer it gets, with its embeddings")
    method: Literal["omp", "nearest", "mean", "zero"] = Field(
        default="omp", description="how rows of new tokens are made of those of shared ones; see the guide"
    )
    k: PositiveInt = Field(default=64, description="shared tokens of each combination, for omp and nearest")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(default=None, description="of the result")
    shard_bytes: PositiveInt = 5_000_000_000
    allow_pickle: bool = Field(default=False, description="allow pytorch_model.bin, read with weights_only=True")
    remote_code: bool = Field(default=False, description="fetch the code that comes with a model")

    def inputs(self) -> Iterator[str]:
        """Yield the two models."""
        yield from (self.model, self.donor)


def make_plan(recipe: TransplantRecipe) -> Found:
    """Open the models and compare their vocabularies; reads headers and tokenizers only."""
    from modicum.jobs.loading.tokenizers import tokenizer_json
    from modicum.weights.checkpoint import Checkpoint
    from modicum.weights.transplant import plan_transplant

    options: dict[str, Any] = {"allow_pickle": recipe.allow_pickle, "remote_code": recipe.remote_code}
    model, donor = (Checkpoint(reference, **options) for reference in (recipe.model, recipe.donor))
    return plan_transplant(model, donor, way=recipe.method, k=recipe.k, dtype=recipe.dtype, convert=tokenizer_json)


def _told(found: Found, recipe: TransplantRecipe) -> str:
    return f"{found.shared} tokens keep their rows, {found.new} are made by {recipe.method}"


def describe(recipe: TransplantRecipe) -> list[str]:
    """Return the plan in words, a line each."""
    found = make_plan(recipe)
    return [_told(found, recipe), *found.plan.describe()]


@job("transplant", plan=describe, outputs=lambda _: ["model"])
def transplant(recipe: TransplantRecipe, run: Run) -> None:
    """Write the model with the other tokenizer.

    Args:
        recipe: The models.
        run: Gets ``model/``, and in its metrics how many tokens are shared and new.
    """
    from modicum.weights.merge import run_plan

    found = make_plan(recipe)
    run.inputs.check()
    note_code(found.plan.models, run)
    for note in [*found.plan.notes, _told(found, recipe)]:
        run.note(note)
    out = run.folder / "model"
    card = model_card(
        {beside(model.name, run.folder): [model.folder] for model in found.plan.models},  # type: ignore[attr-defined]
        base=beside(recipe.model, run.folder),
        method=f"tokenizer transplant ({recipe.method})",
        recipe=beside({key: value for key, value in dump(recipe).items() if key != "out"}, run.folder),
        said={},
    )
    run_plan(
        replace(found.plan, companions={**found.plan.companions, CARD: card}),
        out,
        shard_bytes=recipe.shard_bytes,
        progress=not run.quiet,
        replace=True,
    )
    run.record["metrics"] = {"shared_tokens": found.shared, "new_tokens": found.new}
    run.output("model", out)
