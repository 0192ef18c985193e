"""The exact derivative of a loss along a direction, as the reference for what a probe estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modicum.errors import UnsupportedError
from modicum.optim.zeroth_order.leaves import Leaf


def derivative(
    closure: Callable[[], Any],
    owners: Mapping[Leaf, Sequence[tuple[nn.Module, str]]],
    tangents: Mapping[Leaf, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return the loss and its derivative along ``tangents`` in one forward pass, by forward-mode differentiation.

    Args:
        closure: Returns the scalar loss.
        owners: The modules that hold each leaf, and under which name.
        tangents: The direction, one tensor for each leaf.

    Cost:
        About two to three forward passes of time, and a copy of the direction as large as the model.
    """
    swapped: list[tuple[nn.Module, str, Any]] = []
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        try:
            for leaf, places in owners.items():
                dual = forward_ad.make_dual(leaf.param.detach(), tangents[leaf])  # type: ignore[no-untyped-call]
                for module, name in places:
                    swapped.append((module, name, module._parameters[name]))
                    module._parameters[name] = dual
            loss = closure()
            if not isinstance(loss, Tensor):
                raise UnsupportedError("engine='jvp' needs a differentiable loss: closure must return a tensor.")
            value, slope = forward_ad.unpack_dual(loss)  # type: ignore[no-untyped-call]
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter
    return value, torch.zeros_like(value) if slope is None else slope
