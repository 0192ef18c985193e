"""The mean on the sphere: the direction whose squared angles to all experts are least.

The exact form of :mod:`modicum.weights.methods.multislerp`, by iteration.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Positive, PositiveInt
from modicum.weights.kernels.blocks import gram, weighted_sum
from modicum.weights.methods.multislerp import Mean, shares


@merge_method("karcher", base=False, laws={"bounded", "copies", "permutation"})
def karcher(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    weights: list[float] | None = None,
    iterations: PositiveInt = 10,
    tolerance: Positive = 1e-5,
) -> Tensor:
    r"""Average directions as the Riemannian centre of mass on the sphere, and norms arithmetically.

    .. math::
        \mu = \arg\min_{\|u\| = 1} \sum_t w_t\, \angle(u, u_t)^2, \quad
        \theta = \Big(\sum_t w_t \|\theta_t\|\Big)\, \mu

    Args:
        base: Not used.
        experts: The tensors.
        weights: One for each expert; equal when not given.
        iterations: Most steps.
        tolerance: Stop when a step turns the mean by less than this angle, in radians.

    Returns:
        The average.

    Raises:
        RecipeError: The weights sum to zero.

    Example:
        >>> import torch
        >>> karcher(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])])
        tensor([0.7071, 0.7071])

    Cost:
        Two passes.

    Deviates:
        The paper's mean is one of directions; the length, the mean of the experts' lengths, is our choice. Directions
        that cancel start from the first expert's.

    Reference:
        Karcher, "Riemannian center of mass and mollifier smoothing", Communications on Pure and Applied Mathematics
        30(5), 1977; the iteration is Algorithm A1 of Buss and Fillmore, 2001.
    """
    products = gram(None, experts)
    norms, w = products.diagonal().sqrt(), shares("karcher", experts, weights, normalize=True)
    mean = Mean(products, w)
    for _ in range(iterations):
        if mean.advance() < tolerance:
            break
    first, *rest = experts
    return weighted_sum(None, [first if base is None else first.to(base.dtype), *rest], (w @ norms) * mean.factors)
