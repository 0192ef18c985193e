"""Spherical average of any number of tensors, by one step through the tangent space.

The closed form of :mod:`modicum.weights.methods.karcher`'s first step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import NonNegativeInt
from modicum.weights.blocks import per_expert, working_dtype

TINY = 1e-30


@merge_method("multislerp", base=False, laws={"copies", "permutation"})
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
        ``n + 3`` copies of the tensor in float32.

    Deviates:
        Other tools leave out the angles in their step, which makes it vanish: ``steps: 0`` gives their result.

    Reference:
        Buss and Fillmore, "Spherical Averages and Applications to Spherical Splines and Interpolation", ACM
        Transactions on Graphics 20(2), 2001, Algorithm A1 (one step).
    """
    like, origin, vectors, w = prepare("multislerp", base, experts, weights, normalize_weights)
    norms = vectors.norm(dim=1)
    live = norms > TINY
    if not live.any():
        return like.clone() if base is not None else torch.zeros_like(like)
    units, shares = vectors[live] / norms[live, None], w[live]
    mean = shares @ units
    if float(mean.norm()) < 1e-8:
        raise RecipeError("multislerp: the experts' directions cancel, so no average direction exists. Change weights.")
    mean = mean / mean.norm()
    for _ in range(steps):
        mean = exp_map(mean, shares @ log_map(mean, units))
    return (origin + ((w @ norms) * mean).view(like.shape)).to(like.dtype)


def prepare(
    name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float] | None, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the result looks like, what it is added to, the vectors to average ``(n, p)`` and their weights."""
    like = experts[0] if base is None else base
    dtype = working_dtype(like)
    origin = torch.zeros((), dtype=dtype, device=like.device) if base is None else base.to(dtype)
    vectors = torch.stack([(expert.to(dtype) - origin).reshape(-1) for expert in experts])
    w = torch.tensor(per_expert(weights, len(experts)), dtype=dtype, device=like.device)
    if normalize:
        if float(w.sum()) == 0:
            raise RecipeError(f"{name}: the weights {w.tolist()} sum to 0. Change one.")
        w = w / w.sum()
    return like, origin, vectors, w


def log_map(center: Tensor, units: Tensor) -> Tensor:
    """Return the tangent vectors at ``center`` that lead to each of the unit vectors."""
    cosine = (units @ center).clamp(-1, 1)[:, None]
    ahead = units - cosine * center
    length = ahead.norm(dim=1, keepdim=True)
    # The arc from both its sine and its cosine: its cosine alone loses small angles to rounding.
    return ahead * torch.where(length > TINY, torch.atan2(length, cosine) / length.clamp_min(TINY), 0.0)


def exp_map(center: Tensor, tangent: Tensor) -> Tensor:
    """Return the unit vector that a tangent vector at ``center`` leads to."""
    angle = tangent.norm()
    return angle.cos() * center + (angle.sin() / angle.clamp_min(TINY)) * tangent
