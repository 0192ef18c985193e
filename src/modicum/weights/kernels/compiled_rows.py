"""What compiled passes share, and those over one row of numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
INFINITY = np.int32(0x7F800000)
MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits but the sign; signed patterns compare fastest
jit = partial(njit, cache=True, nogil=True, error_model="numpy")


@intrinsic
def pointer(_context: Any, _address: Any) -> Any:
    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.intp), generate


@jit
def finite(address, kind, size):
    """Say whether no number is infinite or NaN."""
    if kind == FLOAT32:
        words = carray(pointer(address), size, np.uint32)
        most = np.uint32(0)
        for i in range(size):
            most = max(most, words[i] & np.uint32(0x7FFFFFFF))
        return most < np.uint32(0x7F800000)
    halves = carray(pointer(address), size, np.uint16)
    largest = np.uint16(0)
    for i in range(size):
        largest = max(largest, halves[i] & np.uint16(0x7FFF))
    return largest < np.uint16(0x7F80 if kind == BFLOAT16 else 0x7C00)


@jit
def mask(row, factors):
    """Multiply by factors of 0 and 1."""
    for i in range(len(row)):
        row[i] *= np.float32(factors[i])


@jit
def keep_by_rank(numbers, length, draws, lowest, width, picks, stays):
    """Say which entries of rows stay, as ``della.keep_by_rank`` does, with a pick for each that it decides by rank."""
    used, places = 0, np.empty(length, np.int32)
    for first in range(0, len(numbers), length):
        row, drawn = numbers[first : first + length], draws[first : first + length]
        kept = stays[first : first + length]
        for i in range(length):
            kept[i] = drawn[i] < lowest
        found = 0
        for i in range(length):
            places[found] = i
            found += np.uint16(drawn[i] - lowest) < width
        # No branch depends on a draw: half of them would be foreseen wrongly.
        for p in range(found):
            place, pick = places[p], picks[used + p]
            other = np.int64(np.uint64(pick) * np.uint64(length - 1) >> np.uint64(32))
            other += other >= place  # itself is left out
            own, rival = abs(row[place]), abs(row[other])
            kept[place] = (own > rival) | ((own == rival) & (pick & np.uint32(1) > np.uint32(0)))
        used += found
