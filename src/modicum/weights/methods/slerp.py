"""Go from one model to another along an arc instead of a straight line.

Keeps the norm of weights of equal norm, where averaging shrinks it. For two models.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import UnitInterval
from modicum.weights.kernels.blocks import delta_blocks, fold

NEARLY_PARALLEL = 0.9995  # of a cosine: the arc is a straight line to float32


@merge_method("slerp", laws={"bounded"}, base=False, most=2, two=True, bound=32.0)
def slerp(base: Tensor | None, experts: Sequence[Tensor], *, t: UnitInterval) -> Tensor:
    r"""Interpolate between two tensors on the arc between their directions.

    .. math::
        \theta = \frac{\sin((1 - t)\Omega)}{\sin\Omega}\, \theta_0 + \frac{\sin(t\,\Omega)}{\sin\Omega}\, \theta_1,
        \quad \cos\Omega = \frac{\langle\theta_0, \theta_1\rangle}{\|\theta_0\| \|\theta_1\|}

    Args:
        base: The tensor at ``t = 0``; the first expert when not given.
        experts: The tensor at ``t = 1``, after the one at 0 when there is no base.
        t: Where between the two, in [0, 1].

    Returns:
        The interpolated tensor.

    Raises:
        RecipeError: There are not exactly two tensors.

    Example:
        >>> import torch
        >>> slerp(None, [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], t=0.5)
        tensor([0.7071, 0.7071])

    Cost:
        Two passes.

    Deviates:
        Nearly parallel tensors, and tensors of opposite direction, for which no arc is defined, are interpolated on the
        straight line; the latter with a warning, unless they have one entry only.

    Reference:
        Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985, Section 3.3.
    """
    ends = endpoints("slerp", base, experts)
    if t in (0, 1):
        return ends[int(t)].to(ends[0].dtype).clone()
    a, b = arc_weights(*ends, t=t)
    # a·θ₀ + b·θ₁ = (a + b)·θ₀ + b·(θ₁ − θ₀)
    return fold(ends[0], ends[1:], lambda deltas: deltas[0].mul_(b), share=a + b)


def endpoints(name: str, base: Tensor | None, experts: Sequence[Tensor]) -> list[Tensor]:
    """Return the two tensors to go between."""
    ends = [*([] if base is None else [base]), *experts]
    if len(ends) != 2:
        raise RecipeError(
            f"{name} goes between two models, got {len(ends)}. Give a base and one expert, or two experts."
        )
    return ends


def arc_weights(a: Tensor, b: Tensor, *, t: float) -> tuple[float, float]:
    """Return the factors of the two tensors at ``t`` on the arc between them."""
    dots = torch.zeros(3, dtype=torch.float64, device=a.device)
    for _, block, deltas in delta_blocks(a, [b]):
        other = deltas[0].add_(block)
        dots += torch.stack([block @ block, block @ other, other @ other]).double()
    aa, ab, bb = dots.tolist()
    cosine = ab / math.sqrt(aa * bb) if aa and bb else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        if cosine < 0 and a.numel() > 1:
            warnings.warn(
                "slerp: two tensors point in opposite directions, between which no arc is defined. They are "
                "interpolated on the straight line, which shrinks them.",
                RuntimeWarning,
                stacklevel=4,
            )
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
