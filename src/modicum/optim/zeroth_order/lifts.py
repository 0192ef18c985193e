r"""Random directions made of small coordinates and a fixed linear lift.

A low-rank zeroth-order method differs from another only in its lift: which numbers are drawn each step (the
*coordinates* :math:`c`) and how they become a matrix (:math:`Z = L(c)\,R^\top`, linear in :math:`c`):

=============  =====================  ==========================  ==============================
lift           kept factors           coordinates of a step       direction
=============  =====================  ==========================  ==============================
``Diagonal``   :math:`U, V`           :math:`\tau \in R^r`        :math:`U\,diag(\tau)\,V^\top`
``Left``       :math:`V`              :math:`U_t \in R^{m×r}`     :math:`U_t V^\top`
``Core``       :math:`U, V` with      :math:`S_t \in R^{r×r}`     :math:`U S_t V^\top`
               orthonormal columns
=============  =====================  ==========================  ==============================

Because the lift is linear, a weight that only ever moved along such directions is known from its start and one vector
of coordinates. A three-dimensional tensor is a stack of matrices (experts), each with factors of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.random import generator

Scale: TypeAlias = Literal["unit", "none", "unbiased"]
LeftRight: TypeAlias = tuple[Tensor, Tensor]  # (left, right), so that the direction is left @ right.mT


class Lift(Protocol):
    """How coordinates become a direction for one matrix, or a stack of matrices, of ``shape`` (*e, m, n)."""

    rowwise: bool  # the coordinates follow the matrix's rows, so that a shard takes its part of them

    def size(self, shape: Sequence[int], *, rank: int) -> int:
        """Return how many coordinates one direction has."""

    def basis(self, shape: Sequence[int], *, rank: int, seed: int, name: str, epoch: int) -> tuple[Tensor, ...]:
        """Return the factors kept between steps, the one along the rows first when there are two."""

    def factors(self, basis: tuple[Tensor, ...], coordinates: Tensor) -> LeftRight:
        """Return ``(left, right)`` of the direction with these coordinates, given as rows of ``rank`` numbers."""

    def energy(self, shape: Sequence[int], *, rank: int) -> float:
        r"""Return :math:`E\|Z\|^2 / (mn)` for standard normal coordinates."""


class Diagonal:
    """TeZO: both factors are fixed, a step draws one number for each rank-one matrix."""

    rowwise = False

    def size(self, shape: Sequence[int], *, rank: int) -> int:
        return math.prod(shape[:-2]) * rank

    def basis(self, shape: Sequence[int], *, rank: int, seed: int, name: str, epoch: int) -> tuple[Tensor, ...]:
        *stack, rows, columns = shape
        return (
            gaussian([*stack, rows, rank], seed, name, "left", epoch),
            gaussian([*stack, columns, rank], seed, name, "right", epoch),
        )

    def factors(self, basis: tuple[Tensor, ...], coordinates: Tensor) -> LeftRight:
        left, right = basis
        return left * coordinates, right

    def energy(self, _shape: Sequence[int], *, rank: int) -> float:
        return float(rank)


class Left:
    """LOZO: the right factor is kept for a while, a step draws the left one."""

    rowwise = True

    def size(self, shape: Sequence[int], *, rank: int) -> int:
        return math.prod(shape[:-1]) * rank

    def basis(self, shape: Sequence[int], *, rank: int, seed: int, name: str, epoch: int) -> tuple[Tensor, ...]:
        *stack, _, columns = shape
        return (gaussian([*stack, columns, rank], seed, name, "right", epoch),)

    def factors(self, basis: tuple[Tensor, ...], coordinates: Tensor) -> LeftRight:
        (right,) = basis
        return coordinates, right

    def energy(self, _shape: Sequence[int], *, rank: int) -> float:
        return float(rank)


class Core:
    """SubZero: both factors are kept for a while with orthonormal columns, a step draws the square core."""

    rowwise = False

    def size(self, shape: Sequence[int], *, rank: int) -> int:
        return math.prod(shape[:-2]) * rank * rank

    def basis(self, shape: Sequence[int], *, rank: int, seed: int, name: str, epoch: int) -> tuple[Tensor, ...]:
        *stack, rows, columns = shape
        left = gaussian([*stack, rows, rank], seed, name, "left", epoch)
        right = gaussian([*stack, columns, rank], seed, name, "right", epoch)
        return orthonormal(left), orthonormal(right)

    def factors(self, basis: tuple[Tensor, ...], coordinates: Tensor) -> LeftRight:
        left, right = basis
        return left.to(coordinates.dtype) @ coordinates, right

    def energy(self, shape: Sequence[int], *, rank: int) -> float:
        return rank * rank / (shape[-2] * shape[-1])


def gaussian(shape: Sequence[int], seed: int, name: str, purpose: str, epoch: int) -> Tensor:
    """Draw a standard normal factor in float64 from the stream of its names, the same on every device."""
    return torch.randn(*shape, generator=generator(seed, "factor", name, purpose, epoch), dtype=torch.float64)


def orthonormal(matrix: Float[Tensor, "*e n r"]) -> Float[Tensor, "*e n r"]:
    """Return an orthonormal basis of the columns' span, uniformly distributed when the matrix is Gaussian."""
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis


def scales(mode: Scale, energy: float) -> tuple[float, float]:
    r"""Return the factors on the direction in the probe and in the update.

    ``none`` is the published algorithm: both one, so that the probe's radius and the step grow with the rank.
    ``unbiased`` divides the update by the energy, as the theorems do. ``unit`` gives the direction the energy of a
    dense Gaussian, so that ``eps`` and ``lr`` mean what they mean for MeZO; to first order it equals ``unbiased``.

    Example:
        >>> scales("unit", 4.0), scales("unbiased", 4.0), scales("none", 4.0)
        ((0.5, 0.5), (1.0, 0.25), (1.0, 1.0))
    """
    if mode == "unit":
        return 1 / math.sqrt(energy), 1 / math.sqrt(energy)
    return (1.0, 1 / energy) if mode == "unbiased" else (1.0, 1.0)


def direction(left: Tensor, right: Tensor, coordinates: Float[Tensor, " r"], *, scale: Scale = "unit") -> Tensor:
    r"""Return TeZO's probe direction :math:`p\,U\,diag(\tau)\,V^\top`.

    Example:
        >>> u, v = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> direction(u, v, torch.tensor([2.0]))
        tensor([[0., 2.],
                [0., 0.]])
    """
    rank = left.shape[-1]
    probe, _ = scales(scale, float(rank))
    return (left * (coordinates * probe)) @ right.mT


def relative_variance(method: Literal["mezo", "tezo", "lozo", "subzero"], m: int, n: int, *, rank: int = 1) -> float:
    r"""Return :math:`\delta` in :math:`E\|\hat g - \nabla f\|^2 = \delta\,\|\nabla f\|^2` of the unbiased estimator.

    The expectation is over kept factors and coordinates, for an m by n matrix and a vanishing radius.

    Example:
        >>> relative_variance("tezo", 4, 3, rank=2), relative_variance("mezo", 4, 3)
        (51.0, 13.0)
    """
    size = m * n
    return float(
        {
            "mezo": size + 1,
            "tezo": 1 + size + (2 * size + 6 * (m + n) + 10) / rank,
            "lozo": 1 + size + (2 * (m + n) + 2) / rank,
            "subzero": size * (1 + 2 / rank**2) - 1,
        }[method]
    )
