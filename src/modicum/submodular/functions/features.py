"""Facility location of similarities that are computed when they are needed, or kept for the nearest alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.submodular.functions.base import Matrix, no_closed_form, pieces, row_weights
from modicum.submodular.functions.facility import FacilityLocation
from modicum.submodular.partition import Partition

Kernel: TypeAlias = Literal["cosine", "dot", "rbf"] | Callable[[Tensor, Tensor], Tensor]


class FeatureLocation(FacilityLocation):
    """Facility location whose columns are similarities, computed when they are asked for.

    Args:
        X: Features of the elements, (n, d).
        Y: Features of the rows, (m, d).
        kernel: See :meth:`FacilityLocation.from_features`.
        weights: A weight for each row.

    Raises:
        RecipeError: Features are not finite or do not fit, or the kernel is unknown.
    """

    exact = False
    instead = "Give neighbours=, which keeps a sparse matrix. "

    def __init__(self, X: Matrix, Y: Matrix, *, kernel: Kernel = "cosine", weights: Matrix | None = None) -> None:
        self.X, self.Y = (_features(values, name) for values, name in ((X, "X"), (Y, "Y")))
        if self.X.shape[1] != self.Y.shape[1]:
            raise RecipeError(f"X has {self.X.shape[1]} features and Y {self.Y.shape[1]}, expected as many.")
        if isinstance(kernel, str) and kernel not in ("cosine", "dot", "rbf"):
            raise RecipeError(f"kernel is {kernel!r}, expected cosine, dot, rbf or a function of two matrices.")
        self.kernel = kernel
        self.dtype, self.device, self.worlds = self.X.dtype, self.X.device, ()
        self.weights = row_weights(weights, self.Y.new_empty(1, len(self.Y), 1)[0])
        if kernel == "cosine":
            self.X, self.Y = (part / part.norm(dim=1, keepdim=True).clamp_min(1e-12) for part in (self.X, self.Y))
        self.width, self.columns, self.n = len(self.X), None, len(self.X)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.Y)

    def similarities(self, elements: Tensor) -> Tensor:
        """Return the columns of some elements, (elements, m)."""
        x = self.X[elements]
        if callable(self.kernel):
            return self._own(self.kernel, x)
        if self.kernel == "rbf":
            squares = x.square().sum(1)[:, None] + self.Y.square().sum(1) - 2 * x @ self.Y.T
            found = squares.clamp_(min=0).div_(-x.shape[1]).exp_()
        else:
            found = x @ self.Y.T
        return found.clamp_(min=0)

    def _own(self, kernel: Callable[[Tensor, Tensor], Any], x: Tensor) -> Tensor:
        found = torch.as_tensor(kernel(x, self.Y)).to(self.device, self.dtype)
        if found.shape != (len(x), self.rows):
            raise RecipeError(
                f"kernel gave a matrix of shape {tuple(found.shape)}, expected ({len(x)}, {self.rows}): a row for each "
                "element, a column for each row to serve."
            )
        if not bool(found.isfinite().all()):
            i, j = (int(part) for part in (~found.isfinite()).nonzero()[0])
            raise RecipeError(f"kernel gave {float(found[i, j]):g} at [{i}, {j}], expected finite similarities.")
        return found.clamp(min=0)

    def _lookup(self, elements: Tensor, world: Tensor | None) -> Tensor:  # noqa: ARG002
        flat = elements.flatten()
        known = flat < self.n
        if bool(known.all()):
            return self.similarities(flat).reshape(*elements.shape, self.rows)
        found = torch.zeros(len(flat), self.rows, dtype=self.dtype, device=self.device)
        found[known] = self.similarities(flat[known])
        return found.reshape(*elements.shape, self.rows)

    def last_gains(self) -> Tensor:
        """Return what each element adds to all others, (1, n) without worlds."""
        best, second, whose = _two_best(self)
        return torch.zeros(self.n, dtype=self.dtype).scatter_add_(0, whose, (best - second) * self.weights)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        raise no_closed_form(self, "multilinear extension")

    def policy_gains(self, x: Tensor, partition: Partition, z: Tensor) -> Tensor:  # noqa: ARG002
        """Refuse: the extension needs all similarities."""
        raise no_closed_form(self, "policy extension")


class SparseLocation(FacilityLocation):
    """Facility location that knows a few best elements of each row; all others serve it not at all.

    Args:
        values: Similarities ≥ 0 of each row in descending order, (m, k).
        elements: The elements that have them, (m, k).
        n: Number of elements.
        weights: A weight for each row.
    """

    def __init__(self, values: Tensor, elements: Tensor, *, n: int, weights: Tensor) -> None:
        self.values, self.elements, self.weights = values, elements, weights
        self.dtype, self.device, self.worlds = values.dtype, values.device, ()
        self.width, self.columns, self.n = n, None, n
        order = elements.flatten().argsort(stable=True)
        # By columns: of each element, the rows that it serves and how well.
        self._served = (order // elements.shape[1], values.flatten()[order])
        counts = torch.bincount(elements.flatten(), minlength=n + 1)
        self._starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.values)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        return self.values.double()[None], self.elements[None]

    def _lookup(self, elements: Tensor, world: Tensor | None) -> Tensor:  # noqa: ARG002
        flat = elements.flatten()
        starts, counts = self._starts[flat], self._starts[flat + 1] - self._starts[flat]
        line = torch.repeat_interleave(torch.arange(len(flat)), counts)
        place = torch.arange(len(line)) - (counts.cumsum(0) - counts)[line] + starts[line]
        found = torch.zeros(len(flat), self.rows, dtype=self.dtype, device=self.device)
        found[line, self._served[0][place]] = self._served[1][place]
        return found.reshape(*elements.shape, self.rows)

    def last_gains(self) -> Tensor:
        """Return what each element adds to all others, (n,)."""
        second = self.values[:, 1] if self.values.shape[1] > 1 else torch.zeros_like(self.values[:, 0])
        lead = (self.values[:, 0] - second) * self.weights
        return torch.zeros(self.n, dtype=self.dtype).scatter_add_(0, self.elements[:, 0], lead)

    def policy_gains(self, x: Tensor, partition: Partition, z: Tensor) -> Tensor:
        """Return expected gains over what the others draw, by way of all columns."""
        from modicum.submodular.functions.policy_extension import facility_gains

        dense = self._lookup(torch.arange(self.n), None).mT.double()
        return facility_gains(dense, self.weights.double(), x, partition, z)


def nearest(f: FeatureLocation, neighbours: int) -> SparseLocation:
    """Keep the ``neighbours`` best elements of each row of ``f``.

    Raises:
        RecipeError: There are not so many elements.
    """
    if not 1 <= neighbours <= f.n:
        raise RecipeError(f"neighbours is {neighbours}, expected 1 to {f.n}, the number of elements.")
    best = torch.zeros(f.rows, 0, dtype=f.dtype)
    whose = torch.zeros(f.rows, 0, dtype=torch.long)
    for part in pieces(f.n, f.rows):
        some = torch.arange(f.n)[part]
        best = torch.cat([best, f.similarities(some).T], 1)
        whose = torch.cat([whose, some.expand(f.rows, -1)], 1)
        # Stable, so that of equal similarities the element of the lowest number stays.
        order = best.sort(dim=1, descending=True, stable=True).indices[:, :neighbours]
        best, whose = best.gather(1, order), whose.gather(1, order)
    return SparseLocation(best, whose, n=f.n, weights=f.weights)


def _two_best(f: FeatureLocation) -> tuple[Tensor, Tensor, Tensor]:
    best = torch.full((f.rows,), -1.0, dtype=f.dtype)
    second, whose = torch.zeros(f.rows, dtype=f.dtype), torch.zeros(f.rows, dtype=torch.long)
    for part in pieces(f.n, f.rows):
        found = f.similarities(torch.arange(f.n)[part])
        top, place = found.max(0)
        next_best = found.scatter_(0, place[None], 0).amax(0)
        second = torch.maximum(torch.minimum(best, top), torch.maximum(second, next_best))
        whose = torch.where(top > best, place + part.start, whose)
        best = torch.maximum(best, top)
    return best, second, whose


def _features(values: Any, name: str) -> Tensor:
    found = torch.as_tensor(values).detach()
    found = found if found.dtype == torch.float32 else found.double()
    if found.ndim != 2 or 0 in found.shape or not bool(found.isfinite().all()):
        raise RecipeError(f"{name} of shape {tuple(found.shape)}, expected finite features, (number, length).")
    return found
