r"""Steps that stay in :math:`\{b \ge 0, \sum b \le 1\}`, in several geometries, and draws from its points.

Every function works on the last dimension, for any number of agents and worlds before it, in the dtype that comes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.types import NonNegative, Positive, UnitInterval


@guarded
def project_capped_simplex(v: Any, *, total: Positive = 1.0) -> Tensor:
    r"""Return the nearest point of :math:`\{b \ge 0, \sum b \le \text{total}\}`.

    .. math::
        b = \max(v - \max(\tau, 0), 0), \qquad
        \tau = \max_k \frac{v_{(1)} + \dots + v_{(k)} - \text{total}}{k}

    Args:
        v: Points, (..., K).
        total: The most that a point may sum to.

    Returns:
        The projections, of the shape of ``v``.

    Raises:
        RecipeError: ``total`` is not positive.

    Example:
        >>> project_capped_simplex([0.5, 0.75, -0.25]).tolist()
        [0.375, 0.625, 0.0]

    Cost:
        One sort.

    Reference:
        Held, Wolfe and Crowder, "Validation of Subgradient Optimization", 1974; Duchi et al., ICML 2008, figure 1.
    """
    if not total > 0:
        raise RecipeError(f"total is {total}, expected a number above 0.")
    v = numbers(v)
    top = v.amax(-1, keepdim=True)
    below = v - top  # next to a large number the total would be lost in rounding
    over = below.sort(dim=-1, descending=True).values.cumsum_(-1).sub_(total)
    shift = over.div_(_ranks(v.shape[-1], v.dtype, v.device)).amax(-1, keepdim=True)
    return torch.where(top + shift <= 0, v, below.sub_(shift)).clamp_(min=0)


@lru_cache(maxsize=64)
def _ranks(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(1, count + 1, dtype=dtype, device=device)


def kl_capped_simplex_step(y: Any, grad: Any, *, eta: Any) -> Tensor:
    r"""Return the multiplicative step and its exact Kullback–Leibler projection, in logarithms.

    .. math::
        s_a = y_a e^{\eta g_a}, \qquad b = s \text{ if } \textstyle\sum s \le 1 \text{ else } s / \sum s

    Args:
        y: Points with entries ≥ 0, (..., K).
        grad: Gradients, of the shape of ``y``.
        eta: The step, a number or a tensor that broadcasts.

    Returns:
        The new points. An entry of 0 stays 0.

    Example:
        >>> [round(b, 6) for b in kl_capped_simplex_step([0.1, 0.1], [1.0, 0.0], eta=0.5).tolist()]
        [0.164872, 0.1]

    Cost:
        One logarithm and one exponential an entry.

    Reference:
        Zhang et al., "Near-Optimal Online Learning for Multi-Agent Submodular Coordination", ICLR 2025,
        arXiv:2502.05028, Algorithm 2; the logarithmic form is ours.
    """
    logs = numbers(y).log() + eta * numbers(grad)
    mass = logs.logsumexp(-1, keepdim=True).clamp_(min=0)
    return (logs - mass).exp_()


@guarded
def bregman_step(
    y: Any, grad: Any, *, eta: NonNegative, mirror: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor]
) -> Tensor:
    r"""Return a mirror step by any separable geometry, given its mirror map.

    .. math::
        b = (\nabla\varphi)^{-1}\bigl(\nabla\varphi(y) + \eta g - \lambda\bigr)_+, \qquad \lambda \ge 0 \text{ least
        with } \textstyle\sum b \le 1

    Args:
        y: Points in the domain of ``mirror``, (..., K).
        grad: Gradients, of the shape of ``y``.
        eta: The step.
        mirror: The increasing derivative :math:`\varphi'` of one coordinate, applied entry by entry.
        inverse: Its inverse.

    Returns:
        The new points, to 1e-15 in :math:`\lambda`.

    Example:
        >>> step = bregman_step([0.5, 0.5], [1.0, 0.0], eta=0.5, mirror=torch.log, inverse=torch.exp)
        >>> torch.allclose(step, kl_capped_simplex_step([0.5, 0.5], [1.0, 0.0], eta=0.5))
        True

    Cost:
        One bisection of 100 steps.

    Reference:
        Krichene, Krichene and Bayen, "Efficient Bregman Projections onto the Simplex", CDC 2015.
    """
    moved = mirror(numbers(y)) + eta * numbers(grad)

    def at(shift: Tensor) -> Tensor:
        return inverse(moved - shift).nan_to_num(0.0, posinf=torch.finfo(moved.dtype).max).clamp(min=0)

    low = torch.zeros_like(moved[..., :1])
    high = torch.ones_like(low)
    for _ in range(60):
        high = torch.where(at(high).sum(-1, keepdim=True) > 1, 2 * high, high)
    free = at(low).sum(-1, keepdim=True) <= 1
    for _ in range(100):
        middle = (low + high) / 2
        above = at(middle).sum(-1, keepdim=True) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    return torch.where(free, at(torch.zeros_like(high)), at(high))


@guarded
def mix_uniform(x: Any, uniform: Any, *, gamma: UnitInterval) -> Tensor:
    r"""Return :math:`(1 - \gamma) x + \gamma u`, which keeps every entry away from 0.

    Args:
        x: Points, (..., n).
        uniform: What is mixed in, broadcast to ``x``.
        gamma: Its share.

    Example:
        >>> mix_uniform([1.0, 0.0], 0.5, gamma=0.5).tolist()
        [0.75, 0.25]

    Cost:
        One pass.

    Reference:
        Zhang et al., ICLR 2025, arXiv:2502.05028, Algorithm 2, the mixing line.
    """
    return (1 - gamma) * numbers(x) + gamma * numbers(uniform)


def sample_actions(p: Any, u: Any, *, residual: Literal["renormalise", "idle"] = "renormalise") -> Tensor:
    """Draw one action for each row of probabilities, given a uniform number.

    Args:
        p: Probabilities, (..., K), of sum at most 1.
        u: Numbers in [0, 1), (...).
        residual: What is done with the mass that is missing to 1: ``renormalise`` the rest, or ``idle`` with it.

    Returns:
        Positions, (...); -1 where a row idles. A row of zeros draws uniformly under ``renormalise``.

    Raises:
        RecipeError: ``residual`` is something else.

    Example:
        >>> sample_actions([0.25, 0.25], 0.6), sample_actions([0.25, 0.25], 0.6, residual="idle")
        (tensor(1), tensor(-1))

    Cost:
        One cumulative sum.
    """
    if residual not in ("renormalise", "idle"):
        raise RecipeError(f"residual is {residual!r}, expected renormalise or idle.")
    p, u = numbers(p), numbers(u)[..., None]
    if residual == "idle":
        place = torch.searchsorted(p.cumsum(-1), u, right=True)[..., 0]
        return torch.where(place < p.shape[-1], place, -1)
    p = torch.where(p.sum(-1, keepdim=True) > 0, p, 1)
    steps = p.cumsum(-1)
    place = torch.searchsorted(steps, u * steps[..., -1:], right=True)[..., 0]
    # Rounding may carry u times the sum up to the sum itself: then the last action of positive probability.
    last = p.shape[-1] - 1 - (p > 0).flip(-1).long().argmax(-1)
    return torch.minimum(place, last)


def numbers(values: Any) -> Tensor:
    """Return a tensor of floating-point numbers: float64, unless a tensor of another such type came."""
    found = array(values, "numbers")
    return found if isinstance(values, Tensor) and found.is_floating_point() else found.double()


def array(values: Any, name: str) -> Tensor:
    """Return numbers as a tensor: a tensor as it is, anything else by way of NumPy.

    Raises:
        RecipeError: They are no numbers, or rows of several lengths.
    """
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(np.asarray(values))
    except (TypeError, ValueError):
        shown = repr(values)
        shown = shown if len(shown) <= 80 else shown[:80] + "…"
        raise RecipeError(f"{name}: {shown} is no array. Expected numbers, in rows of one length.") from None
