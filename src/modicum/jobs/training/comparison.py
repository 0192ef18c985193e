"""Open the full fine-tune that an adapter is to be compared to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modicum.jobs.training.adapter import Started
    from modicum.jobs.training.adapter_geometry import Change
    from modicum.jobs.training.recipe import ModelSection


def full_change(section: ModelSection, full: str, model: Any, started: Started) -> Change:
    """Return the full fine-tune's change by module; opened before training, so that a wrong path costs no training.

    Args:
        section: The base.
        full: Path of the full fine-tune.
        model: The model with its adapter.
        started: The start of the adapter, which is known.
    """
    from modicum.jobs.training.adapter_geometry import change_between
    from modicum.weights.checkpoint import Checkpoint

    base, other = (Checkpoint(name, allow_pickle=section.allow_pickle) for name in (section.path, full))
    return change_between(base, other, started.start, transposed=bool(model.peft_config["default"].fan_in_fan_out))
