"""Spherical average of any number of tensors, by one step through the tangent space.

The closed form of :mod:`modicum.weights.methods.karcher`'s first step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import NonNegativeInt
from modicum.weights.kernels.blocks import cancels, gram, per_expert, weighted_sum

TINY = 1e-30
CANCELLED = 3e-3  # length of a mean of unit vectors: below it, the rounding of inner products in float32 decides


@merge_method("multislerp", base=False, laws={"bounded", "copies", "permutation"})
def multislerp(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    weights: list[float] | None = None,
    normalize_weights: bool = True,
    steps: NonNegativeInt = 1,
) -> Tensor:
    r"""Average directions on the sphere around their normalised mean, and norms arithmetically.

    .. math::
        \mu = \frac{\sum_t w_t u_t}{\|\sum_t w_t u_t\|}, \quad u_t = \frac{\theta_t}{\|\theta_t\|}, \quad
        \theta = \Big(\sum_t w_t \|\theta_t\|\Big)\, \exp_\mu\Big(\sum_t w_t \log_\mu u_t\Big)

    Args:
        base: When given, the deltas from it are averaged and added to it.
        experts: The tensors.
        weights: One for each expert; equal when not given.
        normalize_weights: Divide the weights by their sum.
        steps: How often to go from the mean along the tangents; 0 stays at the normalised mean of the directions.

    Returns:
        The average.

    Raises:
        RecipeError: The weights sum to zero, or the directions cancel.

    Example:
        >>> import torch
        >>> multislerp(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        tensor([0.7071, 0.7071])

    Cost:
        Two passes.

    Deviates:
        Other tools leave out the angles in their step, which makes it vanish: ``steps: 0`` gives their result.

    Reference:
        Buss and Fillmore, "Spherical Averages and Applications to Spherical Splines and Interpolation", ACM
        Transactions on Graphics 20(2), 2001, Algorithm A1 (one step).
    """
    products = gram(base, experts)
    norms, w = products.diagonal().sqrt(), shares("multislerp", experts, weights, normalize=normalize_weights)
    mean = Mean(products, w)
    if mean.cancels:
        raise RecipeError("multislerp: the experts' directions cancel, so no average direction exists. Change weights.")
    for _ in range(steps):
        mean.advance()
    return weighted_sum(base, experts, (w @ norms) * mean.factors)


def shares(name: str, experts: Sequence[Tensor], weights: Sequence[float] | None, *, normalize: bool) -> Tensor:
    """Return the weights in float64, divided by their sum when they are to be normalized."""
    w = torch.tensor(per_expert(weights, len(experts)), dtype=torch.float64, device=experts[0].device)
    if not normalize:
        return w
    if cancels(w.tolist()):
        raise RecipeError(f"{name}: the weights {w.tolist()} sum to 0. Change one.")
    return w / w.sum()


class Mean:
    """A direction among vectors, as factors on these: all that a spherical mean needs is their inner products.

    Vectors of no length have no direction and take no part.
    """

    def __init__(self, products: Tensor, weights: Tensor) -> None:
        norms = products.diagonal().sqrt()
        live = norms > TINY
        self._inverse = torch.where(live, 1 / norms.clamp_min(TINY), 0.0)
        self._cosines = products * torch.outer(self._inverse, self._inverse)
        self.weights = torch.where(live, weights, 0.0)
        length = self._length(self.weights)
        self.cancels = bool(live.any()) and length < CANCELLED * float(self.weights.abs().sum())
        self._center = self.weights / max(length, TINY)
        if self.cancels:
            self._center = torch.zeros_like(weights).index_fill_(0, live.nonzero()[0], 1.0)

    @property
    def factors(self) -> Tensor:
        """The direction, of length one, as a sum of the vectors with these factors."""
        return self._center * self._inverse

    def advance(self) -> float:
        """Go along the weighted mean of the tangents that lead to the vectors; return the angle gone."""
        cosine = (self._cosines @ self._center).clamp(-1, 1)
        sine = (1 - cosine.square()).sqrt()
        # The arc from both its sine and its cosine; to the opposite point no arc is shortest.
        stretch = torch.where(sine > 1e-3, torch.atan2(sine, cosine) / sine.clamp_min(TINY), (cosine > 0).double())
        ahead = self.weights * stretch
        tangent = ahead - (ahead @ cosine) * self._center
        angle = self._length(tangent)
        self._center = math.cos(angle) * self._center + (math.sin(angle) / max(angle, TINY)) * tangent
        return angle

    def _length(self, factors: Tensor) -> float:
        return float((factors @ self._cosines @ factors).clamp_min(0).sqrt())
