"""Elementwise arithmetic on deltas, a cache-sized block at a time.

A method that works entry by entry needs no copy of its tensors: :func:`fold` walks over them in blocks that stay in
the processor's cache, in float32 whatever the checkpoint's dtype, and casts once, when a block of the result is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError
from modicum.weights.kernels import fused

BLOCK = 1 << 17  # entries; with three experts the working set is about 3 MB
WIDE = 1 << 24  # on an accelerator, whose kernels take longer to start than to do what a cache holds


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return float32, or float64 for float64 input."""
    return torch.promote_types(tensor.dtype, torch.float32)


def delta_blocks(
    base: Tensor, experts: Sequence[Tensor], *, row: int = 1, size: int = BLOCK
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield where a block lies, the base there, and the experts' deltas ``(n, block)``; both may be overwritten.

    A block holds about ``size`` entries, in whole rows of ``row``.
    """
    base, *experts = (tensor.detach() for tensor in (base, *experts))  # parameters of a model are merged like tensors
    dtype = working_dtype(base)
    if not base.numel():
        return
    size = block_size(base, row, size)
    origin = torch.empty(size, dtype=dtype, device=base.device)
    deltas = torch.empty(len(experts), size, dtype=dtype, device=base.device)
    start = 0
    if fused.usable(base, *experts):
        fill = fused.deltas(base, experts)
        for start in range(0, base.numel(), size):
            n = min(size, base.numel() - start)
            fill(start, n, origin, deltas)
            yield slice(start, start + n), origin[:n], deltas[:, :n]
        return
    rows = deltas.unbind()
    # Cut at once: at this size of block a slice more would cost as much as an operation on the numbers.
    for block, *others in zip(*(torch.split(tensor.reshape(-1), size) for tensor in (base, *experts))):
        n = len(block)
        if n < size:
            origin, deltas = origin[:n], deltas[:, :n]
            rows = deltas.unbind()
        origin.copy_(block)
        for delta, other in zip(rows, others):
            delta.copy_(other).sub_(origin)
        yield slice(start, start + n), origin, deltas
        start += n


def block_size(base: Tensor, row: int, size: int = BLOCK) -> int:
    """Return how many entries a block of whole rows holds."""
    return min(max(1, size // row) * row, base.numel())


def wide(base: Tensor) -> int:
    """Return the size of block that suits the device, for what does not depend on where a block ends."""
    return BLOCK if base.device.type == "cpu" else WIDE


def deltas_in_turn(
    base: Tensor, experts: Sequence[Tensor], *, size: int = BLOCK
) -> Iterator[tuple[slice, Tensor, Iterator[Tensor]]]:
    """Yield where a block lies, the base there, and one expert's delta after another, each in the memory of the last.

    For sums over many experts: blocks may be large and still stay in the cache, however many experts there are.
    """
    base, *experts = (tensor.detach() for tensor in (base, *experts))
    dtype = working_dtype(base)
    if not base.numel():
        return
    size = min(size, base.numel())
    whole = [torch.empty(size, dtype=dtype, device=base.device) for _ in range(2)]
    start = 0
    for block, *others in zip(*(torch.split(tensor.reshape(-1), size) for tensor in (base, *experts))):
        origin, delta = (buffer[: len(block)] for buffer in whole)
        origin.copy_(block)
        yield slice(start, start + len(block)), origin, (delta.copy_(other).sub_(origin) for other in others)
        start += len(block)


_place = threading.local()


@contextmanager
def result_in(out: Tensor | None) -> Iterator[None]:
    """Let this thread's next :func:`fold` write its result into ``out``, if it fits, and not into memory of its own."""
    _place.out = out
    try:
        yield
    finally:
        _place.out = None


def result_like(base: Tensor) -> Tensor:
    """Return memory for a result of the shape and dtype of ``base``; where :func:`result_in` says, if it fits."""
    out = _claimed(base, base.device)
    return torch.empty_like(base, memory_format=torch.contiguous_format) if out is None else out


def brought_back(result: Tensor) -> Tensor:
    """Return the result of an accelerator in memory; where :func:`result_in` says, if it fits."""
    out = _claimed(result, torch.device("cpu"))
    return result.cpu() if out is None else out.copy_(result)


def _claimed(like: Tensor, device: torch.device) -> Tensor | None:
    """Return the place that :func:`result_in` gave, if it lies there and fits a result like this one."""
    out: Tensor | None = getattr(_place, "out", None)
    if out is None or out.device != device:  # what an accelerator makes goes there at the end
        return None
    _place.out = None  # once: a method that folds twice needs two
    return out if (out.shape, out.dtype) == (like.shape, like.dtype) else None


def fold(
    base: Tensor,
    experts: Sequence[Tensor],
    kernel: Callable[[Tensor], Tensor],
    *,
    share: float = 1.0,
    row: int = 1,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``share * base + kernel(deltas)``, block by block, in the dtype of ``base``.

    Args:
        base: The tensor that the deltas are taken from.
        experts: Tensors of its shape.
        kernel: From deltas ``(n, block)``, which it may overwrite, to the merged delta ``(block,)``. Blocks come in
            the order of their entries. One that says in ``parts`` what it does may be done by a compiled pass.
        share: Factor on the base.
        row: A block holds whole rows of so many entries.
        dtype: Of the result, where it is another.
    """
    base, *experts = (tensor.detach() for tensor in (base, *experts))
    out = result_like(base) if dtype is None else torch.empty(base.shape, dtype=dtype, device=base.device)
    parts: fused.Parts | None = getattr(kernel, "parts", None)
    if parts is not None and fused.usable(base, *experts, out):
        sizes = [len(block) for block in torch.split(base.view(-1), block_size(base, row))]
        fused.fold(base, experts, parts, out, share=share, sizes=sizes)
        return out
    flat, size = out.view(-1), BLOCK if parts is None or parts.factors is not None else wide(base)
    for where, origin, deltas in delta_blocks(base, experts, row=row, size=size):
        merged = kernel(deltas)
        flat[where] = (origin if share == 1 else origin.mul_(share)).add_(merged)
    return out


@dataclass(frozen=True)
class Sum:
    """Merges deltas ``(n, block)`` by summing them with a share of each."""

    shares: Tensor

    def __call__(self, deltas: Tensor) -> Tensor:
        return torch.mv(deltas.T, self.shares)

    @property
    def parts(self) -> fused.Parts:
        return fused.Parts(self.shares)


def multiply_(deltas: Tensor, factors: NDArray[Any]) -> Tensor:
    """Multiply by truth values or factors: on the CPU in NumPy, which is twice as fast where dtypes differ."""
    if deltas.ndim == 1 and factors.itemsize == 1 and fused.usable(deltas):
        return fused.mask_(deltas, factors)
    if deltas.device.type == "cpu":
        np.multiply(deltas.numpy(), factors, out=deltas.numpy())
        return deltas
    return deltas.mul_(torch.from_numpy(factors).to(deltas.device))


def gram(base: Tensor | None, experts: Sequence[Tensor]) -> Tensor:
    """Return the inner products of the experts' deltas in float64; of the experts themselves without a base."""
    products = torch.zeros(len(experts), len(experts), dtype=torch.float64, device=experts[0].device)
    for _, origin, deltas in delta_blocks(experts[0] if base is None else base, experts):
        vectors = deltas.add_(origin) if base is None else deltas
        products += vectors @ vectors.T
    if experts[0].dtype != torch.float64 and not bool(products.isfinite().all()):  # squares beyond float32
        return gram(None if base is None else base.double(), [expert.double() for expert in experts])
    lengths = products.diagonal()
    if base is None and float(lengths.min()) < 1e-6 * float(lengths.max()):
        return gram(torch.zeros_like(experts[0]), experts)  # a far smaller tensor is lost in its difference
    return products


def weighted_sum(base: Tensor | None, experts: Sequence[Tensor], factors: Tensor) -> Tensor:
    """Return the base plus a weighted sum of the experts' deltas; one of the experts themselves without a base."""
    if base is not None:
        w = factors.to(working_dtype(base))
        return fold(base, experts, Sum(w))
    first, *rest = experts
    if float(factors.abs().max()) > 1e3:  # of far smaller tensors, of which nothing is left in a difference
        w = factors.to(working_dtype(first))
        return fold(torch.zeros_like(first), experts, Sum(w))
    w = factors[1:].to(working_dtype(first))
    # Σ cₜθₜ = (Σ cₜ)·θ₁ + Σ cₜ(θₜ − θ₁): equal experts come out exactly.
    return fold(first, rest, Sum(w), share=float(factors.sum()))


def per_expert(
    value: float | Sequence[float] | None, n: int, default: float = 1.0, *, name: str = "weights"
) -> list[float]:
    """Spread one value over ``n`` experts; a sequence stands for itself.

    Example:
        >>> per_expert(0.5, 2), per_expert([1, 2], 2), per_expert(None, 1)
        ([0.5, 0.5], [1, 2], [1.0])
    """
    if value is None:
        return [default] * n
    if isinstance(value, int | float):
        return [value] * n
    check_length(name, value, n)
    return list(value)


def check_length(name: str, values: Sequence[float], experts: int) -> None:
    """Refuse a list that does not hold one value for each expert.

    Raises:
        RecipeError: It does not.
    """
    if len(values) != experts:
        raise RecipeError(
            f"{name} has {len(values)} values for {experts} experts, expected one for each. Values: {list(values)}"
        )


def cancels(weights: Iterable[float]) -> bool:
    """Whether weights sum to zero but for rounding, so that dividing by their sum would magnify it.

    Example:
        >>> cancels([0.1, 0.2, -0.3]), cancels([1e-9, 1e-9])
        (True, False)
    """
    values = list(weights)
    return abs(sum(values)) <= 1e-6 * sum(map(abs, values))


def as_vector(values: Sequence[float], like: Tensor) -> Tensor:
    """Return ``values`` as a vector of the working dtype beside ``like``."""
    return torch.tensor(values, dtype=working_dtype(like), device=like.device)
