"""Open the full fine-tune that an adapter is to be compared to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError

if TYPE_CHECKING:
    from modicum.jobs.training.adapter_geometry import Change
    from modicum.jobs.training.recipe import ModelSection
    from modicum.weights.checkpoint import Checkpoint


def refuse_other_shapes(section: ModelSection, full: str, model: Any) -> None:
    """Refuse a full fine-tune that lacks a module of an adapter, or has it in another shape.

    Args:
        section: The base.
        full: Path of the full fine-tune.
        model: The model with its adapter; its numbers are not needed.

    Raises:
        CheckpointError: It is of another base, or cannot be read.
    """
    from modicum.adapters.layers import lora_layers

    models = _opened(section, full)
    for name, layer in lora_layers(model).items():
        expected = tuple(layer.get_base_layer().weight.shape)
        for one in models:
            found = one.spec(f"{name}.weight").shape if f"{name}.weight" in one else None
            if found != expected:
                raise CheckpointError(
                    f"{one.name} has {name}.weight of shape {found}, expected {expected} as the adapter's base has. "
                    "Give adapter.compare a full fine-tune of the same base."
                )


def full_change(section: ModelSection, full: str, model: Any) -> Change:
    """Return the full fine-tune's change by module.

    Args:
        section: The base.
        full: Path of the full fine-tune, of the same shapes.
        model: The model with its adapter.
    """
    from modicum.jobs.training.adapter_geometry import change_between

    return change_between(*_opened(section, full), transposed=bool(model.peft_config["default"].fan_in_fan_out))


def _opened(section: ModelSection, full: str) -> tuple[Checkpoint, Checkpoint]:
    from modicum.weights.checkpoint import Checkpoint

    base, other = (Checkpoint(name, allow_pickle=section.allow_pickle) for name in (section.path, full))
    return base, other
