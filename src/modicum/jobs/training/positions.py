"""Rows no longer than the positions that a model has a table of: beyond it there is nothing to look up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from modicum.jobs.data.positions import table_of
from modicum.jobs.training.recipe import TrainRecipe

R = TypeVar("R", bound=TrainRecipe)


def within_positions(recipe: R, note: Callable[[str], object]) -> R:
    """Return a recipe whose ``max_length`` is no more than its model's table of positions, if it has one.

    Rows are then cut or left out, and counted, as they are at any other limit. Where positions are computed, as with
    rotary embeddings, a model reads as far as it is told.

    Args:
        recipe: Of a training.
        note: Told where a limit was lowered.
    """
    most = _table(recipe)
    if most is None:
        return recipe
    changed = {
        name: section.model_copy(update={"max_length": most})
        for name in ("data", "eval_data")
        if (section := getattr(recipe, name)) is not None and section.max_length > most
    }
    if not changed:
        return recipe
    note(f"{recipe.model.path} has a table of {most} positions: max_length is {most} ({', '.join(changed)}).")
    return recipe.model_copy(update=changed)


def _table(recipe: TrainRecipe) -> int | None:
    from modicum.jobs.loading.folders import beneath
    from modicum.jobs.loading.models import model_shape
    from modicum.jobs.loading.references import resolve_model

    section = recipe.model
    *_, folder = beneath(resolve_model(section.path, remote_code=section.remote_code), remote_code=section.remote_code)
    config: dict[str, Any] = model_shape(folder, section.scratch or {}, remote_code=section.remote_code).to_dict()
    return table_of(config)
