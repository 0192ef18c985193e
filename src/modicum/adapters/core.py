"""Training only a small matrix between two frozen factors (LoRA-XS, LoRA-SB), as an ordinary adapter.

While it trains, ``lora_B`` is computed as ``frame @ core``; ``fold`` makes it a plain weight again, so that what is
saved is a standard LoRA adapter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from modicum.adapters.layers import lora_layers


class Framed(nn.Module):
    """The product of a frozen frame (out, rank) and the trained core (rank, rank)."""

    frame: Tensor

    def __init__(self, frame: Tensor) -> None:
        super().__init__()
        self.register_buffer("frame", frame, persistent=False)

    def forward(self, core: Tensor) -> Tensor:
        """Return ``lora_B``."""
        return self.frame @ core

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the core whose product is closest to ``weight``."""
        return torch.linalg.lstsq(self.frame, weight).solution


def train_core(peft_model: Any, frames: dict[str, Tensor], *, adapter: str = "default") -> None:
    """Freeze ``lora_A`` and train only the core of ``lora_B``, which starts at zero.

    Args:
        peft_model: The model; its ``lora_A`` holds the frozen right factor already.
        frames: Frozen left factor (out, rank) by module.
        adapter: The adapter to train so.
    """
    for name, layer in lora_layers(peft_model, adapter).items():
        if name not in frames:
            continue
        layer.lora_A[adapter].weight.requires_grad_(False)
        linear = layer.lora_B[adapter]
        with torch.no_grad():
            linear.weight.zero_()
        parametrize.register_parametrization(linear, "weight", Framed(frames[name].to(linear.weight)), unsafe=True)


def fold(peft_model: Any, *, adapter: str = "default") -> None:
    """Make every ``lora_B`` a plain weight again; call it before saving."""
    for layer in lora_layers(peft_model, adapter).values():
        if parametrize.is_parametrized(layer.lora_B[adapter], "weight"):
            parametrize.remove_parametrizations(layer.lora_B[adapter], "weight", leave_parametrized=True)
