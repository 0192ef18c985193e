"""Ways to store an expert's difference from a dense layer, one file each.

A store is a class of one tensor of one expert. It says beforehand what it will write (``specs``) and encodes the
difference (``encode``). The parts that it writes tell :func:`~.reading.reader_of` how to add them to a dense weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.weights.stores.base import Store
    from modicum.weights.stores.kept import store_bytes
    from modicum.weights.stores.reading import Reader, reader_of

__all__ = ["Reader", "Store", "reader_of", "store_bytes"]
face(__name__)
