"""Mergekit files: read as they are, run by modicum's own methods."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.weights.mergekit.document import models_of, read_slices
    from modicum.weights.mergekit.planning import plan_mergekit

__all__ = ["models_of", "plan_mergekit", "read_slices"]

face(__name__)
