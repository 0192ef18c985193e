"""Where compiled passes take the place of torch's blocks: on the CPU, for large tensors, where numba is installed.

Both give the same bits, so nothing depends on which of them was used. This module decides, :func:`usable` alone, and
turns tensors into the addresses that :mod:`~modicum.weights.kernels.compiled` wants; importing that costs a second,
which small models never pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from modicum.weights.kernels.selection import Cut

FEW = 6  # experts whose deltas fit into registers
LEAST = 1 << 16  # entries of a tensor, or of a block of one, for which it pays
KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}
INFINITY = 0x7F800000  # its bit pattern
HIGHEST = 0x7FFFFFFF  # of all patterns without a sign
SLACK = 8  # entries that a pass may write beyond the last that counts
Halves: TypeAlias = NDArray[np.uint16]
Factors = Callable[[int, int], NDArray[Any] | None]
"""From an expert and the length of the next block to truth values, false for what is dropped; None where nothing is."""


class Parts(NamedTuple):
    """What a kernel of :func:`~modicum.weights.kernels.blocks.fold` does to the deltas, step by step.

    Attributes:
        weights: Of the sum, or of the election.
        cuts: For each expert what is kept, and which of that are outliers that are not.
        factors: What a block's deltas are multiplied with.
        ratios: Factors of the experts' deltas.
        elected: Whether only deltas of the elected sign are summed, and how.
    """

    weights: Tensor
    cuts: Sequence[tuple[Cut | None, Cut | None]] | None = None
    factors: Factors | None = None
    ratios: Tensor | None = None
    elected: tuple[bool, bool, float | None, float] | None = None


@lru_cache(maxsize=1)
def installed() -> bool:
    """Whether numba is."""
    return find_spec("numba") is not None


def usable(*tensors: Tensor) -> bool:
    """Whether compiled passes take these tensors."""
    shape = tensors[0].shape
    return (
        tensors[0].numel() >= max(1, LEAST)
        and installed()
        and all(
            tensor.device.type == "cpu" and tensor.dtype in KINDS and tensor.is_contiguous() and tensor.shape == shape
            for tensor in tensors
        )
    )


def prepare(entries: int) -> None:
    """Import what tensors of so many entries will need, before processes are forked that would each import it."""
    if entries >= LEAST and installed():
        from modicum.weights.kernels import compiled_few, compiled_selected  # noqa: F401 - which import the others


def is_finite(tensor: Tensor) -> bool:
    """Say whether no entry is infinite or NaN."""
    from modicum.weights.kernels.compiled_rows import finite

    return bool(finite(tensor.data_ptr(), KINDS[tensor.dtype], tensor.numel()))


def count(
    base: Tensor, experts: Sequence[Tensor], brackets: Sequence[Sequence[tuple[float, float]]]
) -> list[list[tuple[int, int, int, NDArray[Any]]]] | None:
    """Return what lies above, at the higher end, at the lower end, and between, for each expert's brackets.

    ``None`` where a delta is NaN, which has no place among magnitudes.
    """
    from modicum.weights.kernels import compiled, compiled_few

    rows = np.array([t for t, several in enumerate(brackets) for _ in several], np.int64)
    ends = np.array([bracket for several in brackets for bracket in several], np.float32).reshape(-1, 2)
    low, high = np.ascontiguousarray(ends.T).view(np.int32)
    inside = np.empty((len(rows), base.numel() + SLACK), np.int32)  # memory is taken only where it is written
    if _few(base, experts):
        counts, most = compiled_few.brackets(*_as_few(base, experts), rows, low, high, inside)
    else:
        counts, most = compiled.brackets(*_addresses([base, *experts]), base.numel(), rows, low, high, inside)
    if most > INFINITY:
        return None
    found = iter(
        [(int(a), int(b), int(c), row[:d].view(np.float32).copy()) for (a, b, c, d), row in zip(counts, inside)]
    )
    return [[next(found) for _ in several] for several in brackets]


def deltas(base: Tensor, experts: Sequence[Tensor]) -> Callable[[int, int, Tensor, Tensor], None]:
    """Return what fills a block with entries of the base, from one on so many, and one with those of the deltas."""
    from modicum.weights.kernels import compiled

    places = _addresses([base, *experts])
    return lambda start, n, origin, rows: compiled.deltas(*places, start, n, origin.numpy(), rows.numpy())


def fold(
    base: Tensor, experts: Sequence[Tensor], parts: Parts, out: Tensor, *, share: float, sizes: Sequence[int]
) -> None:
    """Write ``share * base`` plus the merged deltas to ``out``.

    Args:
        base: The tensor that the deltas are taken from.
        experts: Tensors of its shape.
        parts: What is done to the deltas.
        out: The result.
        share: Factor on the base.
        sizes: Of the blocks for which ``parts`` has factors.
    """
    from modicum.weights.kernels import compiled

    if _few(base, experts, out) and not (parts.elected and all(parts.elected[:2])):
        _fold_few(base, experts, parts, out, share, sizes)
        return
    n = len(experts)
    cuts, spares = np.zeros((n, 2), np.int32), np.full((n, 2), -1, np.int64)
    cuts[:, 1] = INFINITY + 1
    for t, pair in enumerate(parts.cuts or ()):
        for i, cut in enumerate(pair):
            if cut is not None:
                cuts[t, i] = np.float32(cut.value).view(np.int32)
                spares[t, i] = -1 if cut.exhaustive else cut.spare
    ratios = np.ones(n, np.float32) if parts.ratios is None else parts.ratios.numpy()
    weighted, normalize, positive, scale = parts.elected or (False, False, None, 1.0)
    election = parts.elected is not None, weighted, normalize, np.float32(positive or 0.0)
    tensors, kinds = _addresses([base, *experts, out])
    weights, last, begin = parts.weights.numpy(), (np.float32(scale), np.float32(share)), 0
    for size in sizes if parts.factors else [base.numel()]:
        factors = [parts.factors(t, size) if parts.factors else None for t in range(n)]
        places = np.array([0 if block is None else block.ctypes.data for block in factors], np.int64)
        compiled.merge(tensors, kinds, begin, begin + size, cuts, spares, places, ratios, weights, election, *last)
        begin += size


def _few(base: Tensor, experts: Sequence[Tensor], *others: Tensor) -> bool:
    """Whether the passes for few experts in bfloat16 take these tensors."""
    return 1 <= len(experts) <= FEW and all(tensor.dtype == torch.bfloat16 for tensor in (base, *experts, *others))


def _halves(tensor: Tensor) -> Halves:
    return tensor.reshape(-1).view(torch.int16).numpy().view(np.uint16)


def _as_few(base: Tensor, experts: Sequence[Tensor]) -> tuple[Halves, tuple[Halves, ...]]:
    return _halves(base), tuple(_halves(expert) for expert in experts)


def _fold_few(
    base: Tensor, experts: Sequence[Tensor], parts: Parts, out: Tensor, share: float, sizes: Sequence[int]
) -> None:
    from modicum.weights.kernels import compiled_few

    (origin, others), merged = _as_few(base, experts), _halves(out)
    weights, last = tuple(parts.weights.numpy()), (np.float32(share),)
    plain, masked, settings = compiled_few.summed, compiled_few.summed_masked, last
    if parts.elected is not None:
        plain, masked = compiled_few.elected, compiled_few.elected_masked
        settings = parts.elected[1], np.float32(parts.elected[3]), *last  # type: ignore[assignment]

    def part(where: slice) -> tuple[Halves, tuple[Halves, ...], Halves]:
        return origin[where], tuple(other[where] for other in others), merged[where]

    if parts.factors is None:
        for where, lows, tops in _stretches(origin, others, parts.cuts or [(None, None)] * len(others)):
            plain(*part(where), lows, tops, weights, *settings)
        return
    ratios, begin = tuple(torch.ones(len(others)).numpy() if parts.ratios is None else parts.ratios.numpy()), 0
    for size in sizes:
        factors = (parts.factors(t, size) for t in range(len(others)))
        masks = tuple(np.ones(size, np.uint8) if mask is None else mask.view(np.uint8) for mask in factors)
        masked(*part(slice(begin, begin + size)), masks, ratios, weights, *settings)
        begin += size


def _stretches(
    base: Halves, experts: Sequence[Halves], cuts: Sequence[tuple[Cut | None, Cut | None]]
) -> Iterator[tuple[slice, tuple[np.int32, ...], tuple[np.int32, ...]]]:
    """Yield stretches in which a cut keeps all entries of its value or none, with the least and the largest patterns.

    Where all spare entries of a value have passed, the pattern moves on by one.
    """
    from modicum.weights.kernels import compiled_few

    whole = len(base)

    def end(expert: Halves, cut: Cut | None, without: int, shift: int) -> tuple[int, int]:
        if cut is None:
            return without, whole
        pattern = np.float32(cut.value).view(np.int32)
        return int(pattern) - shift, whole if cut.exhaustive else compiled_few.reach(base, expert, pattern, cut.spare)

    lows = [end(expert, within, 0, 0) for expert, (within, _) in zip(experts, cuts)]
    tops = [end(expert, without, HIGHEST, 1) for expert, (_, without) in zip(experts, cuts)]
    for start, stop in pairwise(sorted({0, whole, *(until for _, until in lows + tops)})):
        low, top = (tuple(np.int32(p + (until <= start)) for p, until in ends) for ends in (lows, tops))
        yield slice(start, stop), low, top


def mask_(row: Tensor, factors: NDArray[Any]) -> Tensor:
    """Multiply a row by truth values."""
    from modicum.weights.kernels import compiled_rows

    compiled_rows.mask(row.numpy(), factors.view(np.uint8))
    return row


def keep_by_rank(
    numbers: Tensor, length: int, draws: NDArray[np.uint16], window: tuple[int, int], picks: NDArray[np.uint32]
) -> NDArray[np.bool_]:
    """Say which entries of rows of a length stay; see :func:`~modicum.weights.methods.della.keep_by_rank`."""
    from modicum.weights.kernels import compiled_rows

    stays, (lowest, width) = np.empty(numbers.numel(), np.bool_), map(np.uint16, window)
    compiled_rows.keep_by_rank(numbers.reshape(-1).numpy(), length, draws, lowest, width, picks, stays)
    return stays


def count_variances(
    base: Tensor, experts: Sequence[Tensor], low: float, high: float
) -> tuple[int, tuple[int, int, int, NDArray[Any]]] | None:
    """Return how many entries differ between the experts, and what :func:`count` returns for a bracket of variances."""
    from modicum.weights.kernels import compiled_few, compiled_selected

    inside = np.empty(base.numel() + SLACK, np.int32)
    ends = np.array([low, high], np.float32).view(np.int32)
    if _few(base, experts):
        found = compiled_few.variances(*_as_few(base, experts), *ends, inside)
    else:
        found = compiled_selected.variances(*_addresses([base, *experts]), base.numel(), *ends, inside)
    counts, most, differing = found
    if most > INFINITY:
        return None
    above, at_high, at_low, within = map(int, counts)
    return int(differing), (above, at_high, at_low, inside[:within].view(np.float32).copy())


class Selected:
    """Deltas of which only those entries are used whose variance between the experts a cut keeps; all without one."""

    def __init__(self, base: Tensor, experts: Sequence[Tensor], cut: Cut | None) -> None:
        self.tensors, self.few = [base, *experts], _few(base, experts)
        self.cut = np.int32(-1) if cut is None else np.float32(cut.value).view(np.int32)
        self.spare = -1 if cut is None or cut.exhaustive else cut.spare

    def squares(self, size: int) -> Iterator[Tensor]:
        """Yield the squares ``(n, block)``, a block of ``size`` after the other; each in the memory of the last."""
        from modicum.weights.kernels import compiled_few, compiled_selected

        fill, which = (compiled_few if self.few else compiled_selected).squares, self._given()
        rows, spares = torch.empty((len(self.tensors) - 1) * size), np.array([self.spare])
        whole = self.tensors[0].numel()
        for start in range(0, whole, size):
            n = min(size, whole - start)
            block = rows[: (len(self.tensors) - 1) * n].view(-1, n)
            fill(*which, start, n, self.cut, spares, block.numpy())
            yield block

    def merge(self, weights: Tensor, out: Tensor) -> None:
        """Write the base plus, over those that have the elected sign, the weighted mean of the deltas to ``out``."""
        from modicum.weights.kernels import compiled_few, compiled_selected

        spares = np.array([self.spare])
        if self.few:
            compiled_few.merge_selected(*self._given(), _halves(out), self.cut, spares, tuple(weights.numpy()))
        else:
            places = _addresses([*self.tensors, out])
            compiled_selected.merge_selected(*places, out.numel(), self.cut, spares, weights.numpy())

    def _given(self) -> tuple[Any, ...]:
        """Return the tensors as a pass takes them."""
        return _as_few(self.tensors[0], self.tensors[1:]) if self.few else _addresses(self.tensors)


def _addresses(tensors: Sequence[Tensor]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    places = np.array([tensor.data_ptr() for tensor in tensors], np.int64)
    return places, np.array([KINDS[tensor.dtype] for tensor in tensors], np.int64)


def products(base: Tensor, others: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return the inner products of a gradient with what others differ by from the base, and with the base itself.

    The one pass whose last bits are not torch's: sums over 2,048 entries go on in float64.

    Args:
        base: Of which :func:`usable` takes all, as of the others.
        others: Tensors of its shape.
        gradient: In float32, of its shape.
    """
    from modicum.weights.kernels import compiled

    gradient = gradient.contiguous()
    sums = np.zeros(len(others) + 1)
    compiled.products(*_addresses([base, *others]), gradient.data_ptr(), base.numel(), sums)
    return torch.from_numpy(sums)
