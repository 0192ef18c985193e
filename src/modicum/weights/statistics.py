"""What was measured of each expert on its own data, by which some methods weigh: their shapes, and the refusals.

A method that states ``statistics="required"`` gets one checkpoint for each expert, whose tensors have the names of the
expert's own. The job ``statistics`` measures and writes such checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from modicum.errors import CheckpointError, RecipeError
from modicum.record import digest
from modicum.registry import merge_method

if TYPE_CHECKING:
    from modicum.weights.checkpoint import Checkpoint

FILE = "statistics.json"  # beside the weights: what was measured, and of which model


def shape_of(measure: str | None, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of what is measured of a tensor of ``shape``; ``None`` where nothing is.

    Example:
        >>> shape_of("fisher", (4, 2)), shape_of("gram", (4, 2)), shape_of("gram", (4,))
        ((4, 2), (2, 2), None)
    """
    if measure == "gram":
        return (shape[1], shape[1]) if len(shape) == 2 else None
    return shape


def check_statistics(method: str, experts: int, given: int) -> None:
    """Refuse statistics that a method does not use, and a method without the statistics that it needs.

    Raises:
        RecipeError: None are given, they are not used, or their number is not that of the experts.
    """
    facts = merge_method[method].facts
    if given and not facts.statistics:
        raise RecipeError(f"{method} uses no statistics of the experts' data. Remove them.")
    if facts.statistics and not given:
        raise RecipeError(
            f"{method} weighs the experts by statistics of their data, and none are given. Measure them with the job "
            f"'statistics' (kind: {facts.measure}), and list a folder for each expert under statistics."
        )
    if given and given != experts:
        raise RecipeError(f"Got {given} statistics for {experts} experts. Give one for each.")


def weights_of(model: Checkpoint) -> str:
    """Return what tells a model's weights from others', wherever they lie."""
    return digest(model.identity)


def check_origin(expert: Checkpoint, statistics: Checkpoint, method: str) -> None:
    """Refuse statistics that say of themselves that they are of another kind, or of another model.

    Raises:
        CheckpointError: They do.
    """
    from modicum.weights.adapter import read_json

    path = statistics.folder / FILE
    about = read_json(path, statistics.name) if path.exists() else {}
    wanted = merge_method[method].facts.measure
    if about.get("kind", wanted) != wanted:
        raise CheckpointError(
            f"{statistics.name} holds statistics of kind {about['kind']}, {method} needs {wanted}. Measure these."
        )
    if about and about.get("weights") != weights_of(expert):
        raise CheckpointError(
            f"{statistics.name} was measured of {about.get('model')}, not of {expert.name} as it is now. Give the "
            "statistics in the order of the experts, or measure them again."
        )


def required(method: str, statistics: Sequence[Tensor] | None, experts: int) -> Sequence[Tensor]:
    """Return the statistics; for the methods, which have no default for them.

    Raises:
        RecipeError: See :func:`check_statistics`.
    """
    check_statistics(method, experts, len(statistics or ()))
    return statistics or ()
