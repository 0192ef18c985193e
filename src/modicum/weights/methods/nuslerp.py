"""Spherical interpolation with a weight for each model, of whole tensors, rows or columns, or of deltas.

Like :mod:`modicum.weights.methods.slerp`, but weighted, and with a base it goes between the deltas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.weights.kernels.blocks import cancels, gram, per_expert, weighted_sum, working_dtype
from modicum.weights.methods.slerp import NEARLY_PARALLEL


def _floats(_: int, knobs: Mapping[str, Any]) -> float:
    return 0.0 if knobs["flatten"] else 9.0


@merge_method("nuslerp", laws={"bounded"}, base=False, experts=2, most=2, floats=_floats, bound=32.0)
def nuslerp(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    weights: list[float] | None = None,
    flatten: bool = True,
    row_wise: bool = False,
) -> Tensor:
    r"""Interpolate between two tensors, or their deltas from a base, on the arc between their directions.

    .. math::
        \theta = \operatorname{slerp}(\theta_1, \theta_2;\ t), \quad t = \frac{w_2}{w_1 + w_2}

    Args:
        base: When given, the deltas from it are interpolated and added to it.
        experts: Two tensors.
        weights: One for each expert; equal when not given.
        flatten: Take the tensor as one vector.
        row_wise: Without ``flatten``: interpolate each row of a matrix (each output) by itself; otherwise each column.

    Returns:
        The interpolated tensor.

    Raises:
        RecipeError: There are not two experts, or the weights sum to zero.

    Example:
        >>> import torch
        >>> nuslerp(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], weights=[1.0, 1.0])
        tensor([0.7071, 0.7071])

    Cost:
        Two passes; without ``flatten``, five copies of the tensor in float32.

    Deviates:
        The paper's vectors have length one; here each tensor, row or column brings its own length. Vectors that are
        parallel or nearly opposite are interpolated on the straight line.

    Reference:
        Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, Section 3.3.
    """
    if len(experts) != 2:
        raise RecipeError(f"nuslerp goes between two experts, got {len(experts)}. Give two.")
    a, b = per_expert(weights, 2)
    if cancels([a, b]):
        raise RecipeError(f"nuslerp: the weights {[a, b]} sum to 0. Change one.")
    like = experts[0] if base is None else base
    if flatten or like.ndim < 2:
        products = gram(base, experts)
        lengths = products.diagonal().sqrt()
        cosine = products[0, 1] / lengths.prod().clamp_min(1e-30)
        return weighted_sum(base, experts, torch.stack(arc_factors(cosine, b / (a + b))))
    dtype = working_dtype(like)
    origin = torch.zeros((), dtype=dtype, device=like.device) if base is None else base.to(dtype)
    first, second = (expert.to(dtype) - origin for expert in experts)
    if row_wise:
        merged = slerp_along(first, second, t=b / (a + b))
    else:
        merged = slerp_along(first.transpose(-1, -2), second.transpose(-1, -2), t=b / (a + b)).transpose(-1, -2)
    return (origin + merged).to(like.dtype)


def slerp_along(a: Tensor, b: Tensor, *, t: float) -> Tensor:
    """Interpolate between the vectors along the last axis; on a straight line where they are parallel."""
    unit_a, unit_b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30) for x in (a, b))
    left, right = arc_factors((unit_a * unit_b).sum(-1, keepdim=True), t)
    return left * a + right * b


def arc_factors(cosine: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return the factors of two vectors at ``t`` on the arc between them."""
    angle = cosine.clamp(-1, 1).acos()
    sine = angle.sin()
    # Near the opposite direction the factors grow as 1 / sine, and rounding chooses the arc.
    straight = (sine.abs() < 1e-6) | (cosine < -NEARLY_PARALLEL)
    safe = torch.where(straight, 1.0, sine)
    left = torch.where(straight, 1 - t, ((1 - t) * angle).sin() / safe)
    right = torch.where(straight, t, (t * angle).sin() / safe)
    return left, right
