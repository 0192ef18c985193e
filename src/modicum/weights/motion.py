"""How one tensor of a mean moves with the coefficients: its value, and its inner products with a gradient.

Checkpoints of one run share almost all of their weights, so everything goes by *differences to the newest checkpoint*:
of inner products with the weights themselves, float32 would keep what they share and lose in which they differ.
Adapters of one base differ by low-rank products, which are never formed one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from modicum.weights.adapter import LowRank
from modicum.weights.averageable import Parts
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors, spec_of
from modicum.weights.kernels import fused
from modicum.weights.kernels.blocks import Sum, as_vector, deltas_in_turn, fold, working_dtype
from modicum.weights.kernels.compare import refuse_non_finite

BLOCK = 1 << 16  # entries in work at once: with a checkpoint beside the gradient, what a core's second cache holds


class Motion(Protocol):
    """One tensor of the mean.

    Attributes:
        moves: Whether a search takes its gradient.
    """

    moves: bool

    def mean(self, weights: Sequence[float]) -> Tensor:
        """Return the weighted sum over the checkpoints, in float32 or wider."""
        ...

    def products(self, gradient: Tensor) -> Tensor:
        """Return the inner product of each checkpoint's tensor with a gradient: ``(n,)`` in float64."""
        ...

    def check(self) -> None:
        """Refuse a checkpoint whose numbers are not finite."""
        ...


@dataclass(frozen=True)
class Stored:
    """A tensor that each checkpoint stores whole.

    Args:
        name: Of the tensor.
        models: The checkpoints, oldest first.
        labels: What to call them.
    """

    name: str
    models: Sequence[Tensors]
    labels: Sequence[str]
    moves = True

    def mean(self, weights: Sequence[float]) -> Tensor:
        """Return the weighted sum; the newest of those that count comes first, the others by their differences."""
        used = [(model, w) for model, w in zip(self.models, weights) if w][::-1]
        if not used:
            newest = self.models[-1][self.name]
            return torch.zeros_like(newest, dtype=working_dtype(newest))
        first, *others = (model[self.name] for model, _ in used)
        # Σ wₜθₜ = (Σ wₜ)·θ₁ + Σ wₜ(θₜ − θ₁): equal checkpoints come out exactly.
        shares = as_vector([w for _, w in used[1:]], first)
        total = math.fsum(w for _, w in used)
        return fold(first, others, Sum(shares), share=total, dtype=working_dtype(first))

    def products(self, gradient: Tensor) -> Tensor:
        """Return the inner products, by differences to the newest checkpoint."""
        *others, newest = (model[self.name] for model in self.models)
        gradient = gradient.to(newest.device)
        compiled = gradient.dtype == torch.float32 and fused.usable(newest, *others)
        found = (fused.products if compiled else _products_in_turn)(newest, others, gradient)
        found[:-1] += found[-1].clone()
        return found.cpu()

    def check(self) -> None:
        """Refuse a checkpoint whose numbers are not finite."""
        refuse_non_finite(self.name, [model[self.name] for model in self.models], self.labels)


@dataclass(frozen=True)
class Products:
    """A weight of one base that each checkpoint changes by a low-rank product.

    Args:
        name: Of the weight.
        base: What the adapters are of.
        changes: Of each checkpoint; ``None`` for one that leaves the weight as it is.
        labels: What to call the checkpoints.
    """

    name: str
    base: Tensors
    changes: Sequence[LowRank | None]
    labels: Sequence[str]
    moves = True

    def mean(self, weights: Sequence[float]) -> Tensor:
        """Return the base plus the weighted sum of the products: of the products, not the product of sums."""
        stored = self.base[self.name]
        weight = stored.to(working_dtype(stored), copy=True)
        total = sum(weights)
        used = [(c, w) for c, w in zip(self.changes, weights) if c is not None and w]
        if total != 1:
            weight.mul_(total)
        if used:
            B = torch.cat([(w * c.scale) * c.B.to(weight.dtype) for c, w in used], 1)
            product = B @ torch.cat([c.A.to(weight.dtype) for c, _ in used])
            weight += product.T if used[0][0].transposed else product
        return weight

    def products(self, gradient: Tensor) -> Tensor:
        r"""Return the inner products: :math:`\langle G, s B A \rangle = s\,\langle B^T G, A \rangle`."""
        known = [change for change in self.changes if change is not None]
        stored = self.base[self.name]
        gradient = gradient.to(stored.device)
        G = (gradient.T if known[0].transposed else gradient).float()
        rows = torch.cat([c.B.float() for c in known], 1).T @ G
        rows.mul_(torch.cat([c.A.float() for c in known]))
        sums = rows.sum(1, dtype=torch.float64)
        shared = _dot(stored, gradient)
        found, start = [], 0
        for change in self.changes:
            rank = 0 if change is None else change.A.shape[0]
            scale = 0.0 if change is None else change.scale
            found.append(shared + scale * float(sums[start : start + rank].sum()))
            start += rank
        return torch.tensor(found, dtype=torch.float64)

    def check(self) -> None:
        """Refuse an adapter whose numbers are not finite, or such a base."""
        for change, label in zip(self.changes, self.labels):
            if change is not None:
                refuse_non_finite(self.name, [change.A, change.B], [label] * 2)
        refuse_non_finite(self.name, [self.base[self.name]], ["the base"])


@dataclass(frozen=True)
class Still:
    """A tensor that stays as it is in one checkpoint; it is copied and cast once."""

    name: str
    model: Tensors
    label: str
    moves = False
    _made: list[Tensor] = field(default_factory=list)

    def mean(self, weights: Sequence[float]) -> Tensor:  # noqa: ARG002
        """Return the tensor: never the checkpoint's own, as a loss may write to it."""
        if not self._made:
            tensor = self.model[self.name]
            self._made.append(tensor.to(working_dtype(tensor), copy=True))
        return self._made[0]

    def products(self, gradient: Tensor) -> Tensor:
        """Refuse: it does not move."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse numbers that are not finite."""
        refuse_non_finite(self.name, [self.model[self.name]], [self.label])


@dataclass(frozen=True)
class Latest:
    """Statistics, which are no weights: those of the newest checkpoint that counts, or of the newest of all."""

    name: str
    models: Sequence[Tensors]
    labels: Sequence[str]
    stays: bool = False
    moves = False

    def mean(self, weights: Sequence[float]) -> Tensor:
        """Return a copy each time, as a model in training mode writes to it."""
        chosen = -1 if self.stays else latest(weights)
        tensor = self.models[chosen][self.name]
        return tensor.to(working_dtype(tensor), copy=True)

    def products(self, gradient: Tensor) -> Tensor:
        """Refuse: it does not move."""
        raise NotImplementedError

    def check(self) -> None:
        """Refuse a checkpoint whose numbers are not finite."""
        refuse_non_finite(self.name, [model[self.name] for model in self.models], self.labels)


def latest(weights: Sequence[float]) -> int:
    """Return the number of the newest checkpoint that counts.

    Example:
        >>> latest([0.5, 0.5, 0.0])
        1
    """
    return max((i for i, w in enumerate(weights) if w), default=len(weights) - 1)


def motions(models: Sequence[Tensors], parts: Parts) -> dict[str, Motion]:
    """Return how each floating-point tensor moves, by name.

    Args:
        models: The checkpoints, oldest first; they fit together.
        parts: How their tensors take part.
    """
    newest, labels, found = models[-1], parts.labels, dict[str, Motion]()
    base = shared_base(models)
    for name in parts.names:
        if not spec_of(newest, name).dtype.is_floating_point:
            continue
        if name in parts.statistics:
            found[name] = Latest(name, models, labels, stays=name in parts.stay)
        elif name in parts.stay:
            found[name] = Still(name, newest, labels[-1])
        elif base is None:
            found[name] = Stored(name, models, labels)
        else:
            adapters = [model.adapter for model in models if isinstance(model, Checkpoint) and model.adapter]
            changes = [adapter.factors.get(name) for adapter in adapters]
            if any(name in adapter.replaced for adapter in adapters) or any(c and not c.plain for c in changes):
                found[name] = Stored(name, models, labels)
            elif any(change is not None for change in changes):
                found[name] = Products(name, base, changes, labels)
            else:
                found[name] = Still(name, base, "the base")
    return found


def shared_base(models: Sequence[Tensors]) -> Checkpoint | None:
    """Return the base, where all models are adapters of one."""
    adapters = [model for model in models if isinstance(model, Checkpoint) and model.adapter]
    if len(adapters) < len(models) or len({model.base.folder.resolve() for model in adapters}) != 1:
        return None
    return adapters[-1].base


def _products_in_turn(base: Tensor, others: Sequence[Tensor], gradient: Tensor) -> Tensor:
    """Return the inner products of a gradient with what others differ by from the base, and with the base itself."""
    flat = gradient.reshape(-1).to(base.device)
    found = torch.zeros(len(others) + 1, dtype=torch.float64, device=base.device)
    sums = torch.empty(len(others) + 1, dtype=working_dtype(base), device=base.device)
    places = sums.unbind()
    for where, origin, deltas in deltas_in_turn(base, others, size=BLOCK):
        part = flat[where].to(origin.dtype)
        for place, delta in zip(places, deltas):
            torch.dot(delta, part, out=place)
        torch.dot(origin, part, out=places[-1])
        found += sums
    return found


def _dot(a: Tensor, b: Tensor) -> float:
    """Return the inner product, summed in float64 block by block."""
    blocks = deltas_in_turn(a, [], size=BLOCK)
    flat = b.reshape(-1).to(a.device)
    return math.fsum(float(torch.dot(origin, flat[where].to(origin.dtype))) for where, origin, _ in blocks)
