"""Merge methods that are called by hand, held to what a merge of models checks before it calls them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.facts import MergeFacts
from modicum.registry import Entry


def held(entry: Entry[MergeFacts]) -> Callable[..., Tensor]:
    """Return a merge method that refuses knobs out of range and tensors that do not fit together.

    Knobs that are not given are left to Python: a density that is missing is a ``TypeError``.
    """

    @functools.wraps(entry.function)
    def call(base: Tensor | None, experts: Sequence[Tensor], **given: Any) -> Tensor:
        _check_tensors(entry, base, experts)
        fields = entry.schema.model_fields
        knobs = {name: _plain(value) for name, value in given.items() if name in fields}
        if all(name in knobs for name, field in fields.items() if field.is_required()):
            checked = entry.knobs(knobs)
            given |= {name: checked[name] for name in knobs}
        with torch.no_grad():
            merged: Tensor = entry.function(base, experts, **given)
        return merged

    return call


def _plain(value: Any) -> Any:
    """Return numbers that stand in a tensor or an array as Python's own."""
    return value.tolist() if isinstance(value, Tensor | np.ndarray | np.generic) else value


def _check_tensors(entry: Entry[MergeFacts], base: Tensor | None, experts: Sequence[Tensor]) -> None:
    if not len(experts):
        raise RecipeError(f"{entry.name}: there are no experts, expected at least one tensor.")
    if base is None and entry.facts.base:
        raise RecipeError(f"{entry.name} needs a base, the tensor that the experts were trained from.")
    like, owner = (experts[0], "experts[0]") if base is None else (base, "base")
    for i, expert in enumerate(experts):
        if expert.shape != like.shape:
            raise CheckpointError(
                f"{entry.name}: experts[{i}] has shape {list(expert.shape)}, expected {list(like.shape)} as {owner}."
            )
