"""What a conversion adds to a model: small parameters that no pre-trained checkpoint brings.

A module says so of itself with ``is_addition = True``. Its parameters are trained and saved with any adapter, and
weight decay leaves them alone: it would shut a gate, or shrink a key whose length is its meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer


def additions(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that a conversion added, by name.

    Example:
        >>> from torch import nn
        >>> class Gate(nn.Linear):
        ...     is_addition = True
        >>> list(additions(nn.ModuleDict({"gate": Gate(1, 1), "base": nn.Linear(1, 1)})))
        ['gate']
    """
    return {name: module for name, module in model.named_modules() if getattr(module, "is_addition", False) is True}


def spare_additions(trainer: Trainer) -> None:
    """Keep the weight decay of any ``transformers.Trainer`` away from what a conversion added to its model."""
    decayed = trainer.get_decay_parameter_names

    def names(model: Any) -> list[str]:
        spared = tuple(f"{name}." for name in additions(model))
        return [name for name in decayed(model) if not name.startswith(spared)]

    trainer.get_decay_parameter_names = names
