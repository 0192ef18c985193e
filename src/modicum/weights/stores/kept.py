"""Stores of some of the entries: which places are kept, and how places and values are written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError
from modicum.weights.files import Spec
from modicum.weights.stores.base import FLOATS, Layout, Store, Values, difference

MOST = 1 << 31  # entries from which on a place takes more than four bytes
NARROW = 1 << 16  # columns up to which a column number takes two bytes


def store_bytes(shape: Sequence[int], kept: int, *, layout: Layout = "bitmask", values: Values = "bf16") -> int:
    """Return how many bytes ``kept`` entries of a tensor take.

    Args:
        shape: Of the tensor; all dimensions but the last count rows.
        kept: Number of entries.
        layout: ``bitmask`` is a bit for each entry, ``csr`` a column number for each kept one and a pointer for each
            row, ``int32`` a place for each kept one, ``seed_only`` nothing but the values.
        values: Dtype of the values; ``int8`` has a float32 scale for each row.

    Example:
        >>> store_bytes((576, 1536), 88473), store_bytes((576, 1536), 88473, layout="csr")
        (287538, 356200)
    """
    return sum(spec.nbytes for spec in kept_specs(shape, kept, layout=layout, values=values).values())


def kept_specs(shape: Sequence[int], kept: int, *, layout: Layout, values: Values) -> dict[str, Spec]:
    """Return shape and dtype of each part of a store of ``kept`` entries."""
    numel, columns = math.prod(shape), shape[-1] if shape else 1
    rows = numel // columns if columns else 0
    if layout in ("csr", "int32") and numel >= MOST:
        raise RecipeError(
            f"layout {layout} counts places in 31 bits, and a tensor of shape {list(shape)} has {numel} entries. Use "
            "layout: bitmask."
        )
    specs = {"values": Spec((kept,), FLOATS.get(values, torch.int8))}
    if values == "int8":
        specs["scale"] = Spec((rows,), torch.float32)
    if layout == "bitmask":
        specs["mask"] = Spec((math.ceil(numel / 8),), torch.uint8)
    elif layout == "csr":
        specs["columns"] = Spec((kept,), torch.int16 if columns <= NARROW else torch.int32)
        specs["rows"] = Spec((rows + 1,), torch.int32)
    elif layout == "int32":
        specs["places"] = Spec((kept,), torch.int32)
    return specs


class Kept(Store):
    """Keeps some entries; a subclass says which, and by what their values are multiplied."""

    def __init__(self, shape: Sequence[int], *, layout: Layout, values: Values, key: int = 0) -> None:
        super().__init__(shape, key=key)
        self.layout, self.values = layout, values

    def count(self) -> int:
        """Return how many entries are kept, whatever the weights."""
        raise NotImplementedError

    def keep(self, dense: Tensor, expert: Tensor, delta: NDArray[Any]) -> tuple[NDArray[np.bool_], float]:
        """Return which entries are kept, and the factor of their values."""
        raise NotImplementedError

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each part."""
        return kept_specs(self.shape, self.count(), layout=self.layout, values=self.values)

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Return places and values of the entries that are kept."""
        delta = difference(dense, expert).numpy()
        mask, factor = self.keep(dense, expert, delta)
        places = np.flatnonzero(mask)
        kept = delta[places] * np.float32(factor)
        parts: dict[str, Tensor] = {}
        if self.values == "int8":
            parts["values"], parts["scale"] = _to_int8(kept, places // self.columns, self.rows)
        else:
            parts["values"] = torch.from_numpy(kept).to(FLOATS[self.values])
        if self.layout == "bitmask":
            parts["mask"] = torch.from_numpy(np.packbits(mask, bitorder="little"))
        elif self.layout == "csr":
            narrow = np.uint16 if self.columns <= NARROW else np.uint32
            numbers = (places % self.columns).astype(narrow)
            parts["columns"] = torch.from_numpy(numbers.view(np.int16 if narrow is np.uint16 else np.int32))
            ends = np.searchsorted(places, np.arange(self.rows + 1) * self.columns)
            parts["rows"] = torch.from_numpy(ends.astype(np.int32))
        elif self.layout == "int32":
            parts["places"] = torch.from_numpy(places.astype(np.int32))
        return parts


def _to_int8(kept: NDArray[Any], rows: NDArray[Any], count: int) -> tuple[Tensor, Tensor]:
    """Round to 255 steps of the largest value of each row."""
    largest = np.zeros(count, np.float32)
    np.maximum.at(largest, rows, np.abs(kept))
    scale = largest / np.float32(127)
    steps = kept / np.where(scale > 0, scale, np.float32(1))[rows]
    return torch.from_numpy(np.rint(steps).astype(np.int8)), torch.from_numpy(scale)


def refuse_seed_only(layout: Layout, name: str) -> None:
    """Refuse to leave out places that a seed does not give back."""
    if layout == "seed_only":
        raise RecipeError(
            f"layout seed_only stores no places, and those of {name} depend on the weights. Use layout: bitmask, or "
            "random_rescaled."
        )
