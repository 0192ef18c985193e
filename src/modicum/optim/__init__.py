"""Gradient rules and zeroth-order optimisers."""

from modicum.optim.adagc import AdaGC

__all__ = ["AdaGC"]
