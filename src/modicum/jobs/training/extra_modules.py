"""Modules that a conversion added to a model: small parameters that no pre-trained checkpoint brings.

Their class says ``is_addition = True``. Their parameters are trained and saved with any adapter, and weight decay
leaves them alone: it would shut a gate, or shrink a key whose length is its meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


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
