"""What all stores have in common: shapes, the difference block by block, and the bytes that they will take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor

from modicum.weights.files import Spec

Parts: TypeAlias = Mapping[str, Tensor]
Values: TypeAlias = Literal["bf16", "int8", "f32"]
Layout: TypeAlias = Literal["bitmask", "csr", "int32", "seed_only"]
BLOCK = 1 << 16  # entries that are decoded at a time: they and their parts stay in a processor's cache
FLOATS = {"bf16": torch.bfloat16, "f32": torch.float32}


class Store:
    """One tensor of one expert: what will be written, and how. The base of every entry of the table.

    Args:
        shape: Of the tensor; the last dimension is a row's.
        key: Names what is drawn at random; see :func:`modicum.philox.words`.
    """

    parts: ClassVar[tuple[str, ...]]

    def __init__(self, shape: Sequence[int], *, key: int = 0) -> None:
        self.shape, self.key = tuple(shape), key
        self.numel = math.prod(self.shape)
        self.columns = self.shape[-1] if self.shape else 1
        self.rows = self.numel // self.columns if self.columns else 0
        self.matrices = math.prod(self.shape[:-2])

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each part, known before any weight is read."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes of all parts, to the byte what a file will hold."""
        return sum(spec.nbytes for spec in self.specs.values())

    @property
    def expected_nbytes(self) -> int:
        """The same, or what is expected where a draw over all entries decides it."""
        return self.nbytes

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Return the parts that stand for ``expert`` − ``dense``."""
        raise NotImplementedError


def difference(dense: Tensor, expert: Tensor) -> Tensor:
    """Return ``expert`` − ``dense`` as a flat float32 vector."""
    return expert.reshape(-1).to(torch.float32) - dense.reshape(-1).to(torch.float32)


def rows_at_a_time(columns: int) -> int:
    """Return how many rows are decoded at a time: a multiple of 8, so that a block of packed bits is whole bytes.

    Example:
        >>> rows_at_a_time(576), rows_at_a_time(1 << 20)
        (112, 8)
    """
    return max(8, BLOCK // max(1, columns) // 8 * 8)
