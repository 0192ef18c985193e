"""Adding a stored difference to a dense weight, a block of whole rows at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import CheckpointError, listed
from modicum.weights.stores.base import Parts, Store, rows_at_a_time
from modicum.weights.stores.random_rescaled import drawn_mask

BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(bool)


class Reader:
    """The stored difference of one tensor of one expert.

    Args:
        parts: What a store wrote.
        shape: Of the tensor.
    """

    def __init__(self, parts: Parts, shape: Sequence[int]) -> None:
        self.frame = Store(shape)
        self.parts = parts
        self.block = rows_at_a_time(self.frame.columns) * self.frame.columns

    def add_(self, out: Tensor, start: int, factor: float) -> None:
        """Add ``factor`` times the entries from ``start`` on to ``out``.

        Args:
            out: Flat float32 on the CPU: one block, or the last and shorter one.
            start: Of the block: a multiple of ``block``.
            factor: The expert's weight.
        """
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Return the whole difference in float32."""
        out = torch.zeros(self.frame.numel)
        for start in range(0, self.frame.numel, self.block):
            self.add_(out[start : start + self.block], start, 1.0)
        return out.view(self.frame.shape)


def reader_of(parts: Parts, shape: Sequence[int], *, key: int = 0, density: float | None = None) -> Reader:
    """Return what reads ``parts``, which their names tell.

    Args:
        parts: What a store wrote.
        shape: Of the tensor.
        key: Of the drawn places, for a store of values alone.
        density: Of the drawn places.

    Raises:
        CheckpointError: No store writes such parts.
    """
    names = set(parts)
    if names == {"bits", "alpha"}:
        return _Signs(parts, shape)
    if {"A", "B"} <= names:
        return _Product(parts, shape)
    if names == {"delta"}:
        return _Delta(parts, shape)
    if "mask" in names:
        return _Masked(parts, shape)
    if "columns" in names:
        return _Rows(parts, shape)
    if "places" in names:
        return _Places(parts, shape)
    if "values" in names and density is not None:
        return _Drawn(parts, shape, key, density)
    raise CheckpointError(f"An expert has the parts {listed(names)}, which no store writes.")


class _Delta(Reader):
    def add_(self, out: Tensor, start: int, factor: float) -> None:
        out.add_(self.parts["delta"][start : start + len(out)], alpha=factor)


class _Signs(Reader):
    """Looks a byte of eight signs up in a table of ±α."""

    def __init__(self, parts: Parts, shape: Sequence[int]) -> None:
        super().__init__(parts, shape)
        self.bits = parts["bits"].numpy()
        self.alpha = parts["alpha"].tolist()
        self.of_matrix = self.frame.numel // max(1, len(self.alpha))
        self.table = np.empty((256, 8), np.float32)
        self.known: float | None = None

    def add_(self, out: Tensor, start: int, factor: float) -> None:
        packed = self.bits[start // 8 : (start + len(out) + 7) // 8]
        if len(self.alpha) == 1:
            self._set(self.alpha[0] * factor)
            out.add_(_looked_up(self.table, packed)[: len(out)])
            return
        first = start // self.of_matrix
        signs = np.where(BITS[packed].reshape(-1)[: len(out)], np.float32(1), np.float32(-1))
        for number in range(first, min(len(self.alpha), -(-(start + len(out)) // self.of_matrix))):
            low, high = number * self.of_matrix - start, (number + 1) * self.of_matrix - start
            where = slice(max(0, low), min(len(out), high))
            out[where].add_(torch.from_numpy(signs[where]), alpha=self.alpha[number] * factor)

    def _set(self, value: float) -> None:
        if value != self.known:
            np.copyto(self.table, np.where(BITS, np.float32(value), np.float32(-value)))
            self.known = value


_scratch = threading.local()


def _looked_up(table: NDArray[Any], packed: NDArray[np.uint8]) -> Tensor:
    """Return the table's row of every byte, in memory that the next call uses again."""
    size = len(packed)
    if len(getattr(_scratch, "rows", ())) < size:
        _scratch.rows = np.empty((size, 8), np.float32)
    found: NDArray[np.float32] = _scratch.rows[:size]
    np.take(table, packed, axis=0, out=found, mode="clip")
    return torch.from_numpy(found).view(-1)


class _Product(Reader):
    """Multiplies two factors, whole rows at a time."""

    def __init__(self, parts: Parts, shape: Sequence[int]) -> None:
        super().__init__(parts, shape)
        self.scale = float(parts["scale"]) if "scale" in parts else 1.0
        self.height = parts["B"].shape[-2]

    def add_(self, out: Tensor, start: int, factor: float) -> None:
        a, b = self.parts["A"], self.parts["B"]
        row, stop = start // self.frame.columns, (start + len(out)) // self.frame.columns
        while row < stop:
            matrix, first = divmod(row, self.height)
            last = min(self.height, first + stop - row)
            one, other = (a, b) if a.ndim == 2 else (a.flatten(0, -3)[matrix], b.flatten(0, -3)[matrix])
            place = out.view(-1, self.frame.columns)[row - start // self.frame.columns :][: last - first]
            place.addmm_(other[first:last].float(), one.float(), alpha=factor * self.scale)
            row += last - first


class _Entries(Reader):
    """Adds values at places: a subclass says which places of a block, and at which value they begin."""

    def _places(self, start: int, size: int) -> tuple[NDArray[Any], int]:
        raise NotImplementedError

    def add_(self, out: Tensor, start: int, factor: float) -> None:
        places, first = self._places(start, len(out))
        values = self.parts["values"][first : first + len(places)].to(torch.float32)
        if "scale" in self.parts:
            values = values.mul_(self.parts["scale"][torch.from_numpy((places + start) // self.frame.columns)])
        out.index_add_(0, torch.from_numpy(places), values, alpha=factor)


class _Masked(_Entries):
    def __init__(self, parts: Parts, shape: Sequence[int]) -> None:
        super().__init__(parts, shape)
        self.mask = parts["mask"].numpy()
        step = self.block // 8
        counts = [int(np.bitwise_count(self.mask[i : i + step]).sum()) for i in range(0, len(self.mask), step)]
        self.firsts = np.concatenate([[0], np.cumsum(counts)]).tolist()

    def _places(self, start: int, size: int) -> tuple[NDArray[Any], int]:
        bits = np.unpackbits(self.mask[start // 8 : (start + size + 7) // 8], count=size, bitorder="little")
        return np.flatnonzero(bits.view(bool)), self.firsts[start // self.block]


class _Rows(_Entries):
    def __init__(self, parts: Parts, shape: Sequence[int]) -> None:
        super().__init__(parts, shape)
        narrow = parts["columns"].dtype == torch.int16
        self.columns = parts["columns"].numpy().view(np.uint16 if narrow else np.uint32)
        self.ends = parts["rows"].numpy()

    def _places(self, start: int, size: int) -> tuple[NDArray[Any], int]:
        width = self.frame.columns
        ends = self.ends[start // width : (start + size) // width + 1]
        rows = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        return rows * width + self.columns[ends[0] : ends[-1]].astype(np.int64), int(ends[0])


class _Places(_Entries):
    def __init__(self, parts: Parts, shape: Sequence[int]) -> None:
        super().__init__(parts, shape)
        self.places = parts["places"].numpy()

    def _places(self, start: int, size: int) -> tuple[NDArray[Any], int]:
        first, last = np.searchsorted(self.places, [start, start + size])
        return self.places[first:last].astype(np.int64) - start, int(first)


class _Drawn(_Masked):
    """Draws the places again, once: they are kept as a bit for each entry."""

    def __init__(self, parts: Parts, shape: Sequence[int], key: int, density: float) -> None:
        frame = Store(shape)
        block = rows_at_a_time(frame.columns) * frame.columns
        sizes = ((start, min(block, frame.numel - start)) for start in range(0, frame.numel, block))
        masks = [np.packbits(drawn_mask(key, *size, density=density), bitorder="little") for size in sizes]
        mask = torch.from_numpy(np.concatenate(masks) if masks else np.zeros(0, np.uint8))
        super().__init__({**parts, "mask": mask}, shape)
