"""Zeroth-order optimisers: fine-tuning with forward passes only."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.optim.zeroth_order.step import Closure, ZerothOrder

__all__ = ["Closure", "ZerothOrder"]

face(__name__)
