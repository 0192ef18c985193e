r"""Random choices of K among n checkpoints, and how a loss pulls at the logits that they are drawn from.

A straight-through mask :math:`m = h + y - \mathrm{stopgrad}(y)` counts as the hard choice h in the loss, and as the
soft one y in the gradient. With :math:`w = m / \sum m` and :math:`c_i = \partial F / \partial w_i`,

.. math::
    \frac{\partial F}{\partial h_i} = \frac{c_i - \sum_j w_j c_j}{\sum_j h_j}, \qquad
    \frac{\partial F}{\partial l_i} = \frac{\partial F}{\partial h_i} \cdot \frac{y_i (1 - y_i)}{\tau}

All in float64 on the CPU: n is small.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """A drawn choice: hard, soft, and the derivative of the soft one in the logits."""

    hard: Tensor
    soft: Tensor
    slope: Tensor


def gumbel(n: int, rng: torch.Generator) -> Tensor:
    """Draw from the Gumbel distribution."""
    return -torch.log(-torch.log(_uniform(n, rng)))


def logistic(n: int, rng: torch.Generator) -> Tensor:
    """Draw from the logistic distribution, that of the difference of two Gumbel variables."""
    return torch.logit(_uniform(n, rng))


def _uniform(n: int, rng: torch.Generator) -> Tensor:
    return torch.rand(n, generator=rng, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)


def exact_mask(logits: Tensor, noise: Tensor, *, k: int, tau: float = 1.0) -> Mask:
    """Choose the k of largest noisy logit; the threshold lies half-way to the next one.

    Example:
        >>> exact_mask(torch.zeros(4), torch.tensor([2.0, 0.5, 1.0, -1.0]), k=2).hard
        tensor([1., 0., 1., 0.])
    """
    z = logits + noise
    ordered = z.sort(descending=True).values
    return _mask(z - (ordered[k - 1] + ordered[k]) / 2, tau)


def independent_mask(logits: Tensor, noise: Tensor, *, tau: float = 1.0) -> Mask:
    """Choose each where its noisy logit is positive: a Bernoulli variable for logistic noise.

    Example:
        >>> independent_mask(torch.tensor([-1.0, 1.0]), torch.zeros(2)).hard
        tensor([0., 1.])
    """
    return _mask(logits + noise, tau)


def _mask(z: Tensor, tau: float) -> Mask:
    y = torch.sigmoid(z / tau)
    return Mask((z > 0).to(y.dtype), y, y * (1 - y) / tau)


def mean_slope(mask: Tensor, c: Tensor) -> Tensor:
    r"""Return the slope in a mask of a loss of the mean :math:`\sum m_i \theta_i / \sum m_i`.

    Example:
        >>> mean_slope(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([3.0, 1.0, 1.0]))
        tensor([ 0.5000, -0.5000, -0.5000])
    """
    total = mask.sum()
    return (c - (mask * c).sum() / total) / total


def project_capped(s: Tensor, k: int) -> Tensor:
    r"""Project onto :math:`\{s \in [0, 1]^n, \sum s \le k\}`, by bisection on the shift.

    Example:
        >>> project_capped(torch.tensor([1.5, 0.9, 0.4, -0.2], dtype=torch.float64), 2)
        tensor([1.0000, 0.7500, 0.2500, 0.0000], dtype=torch.float64)
    """
    inside = s.clamp(0, 1)
    if float(inside.sum()) <= k:
        return inside
    low, high = 0.0, float(s.max())
    for _ in range(100):
        middle = (low + high) / 2
        if float((s - middle).clamp(0, 1).sum()) > k:
            low = middle
        else:
            high = middle
    return (s - high).clamp(0, 1)


def log_order_slope(logits: Tensor, order: Tensor) -> Tensor:
    """Return the slope in the logits of the log-probability of an order, drawn one by one without putting back.

    Args:
        logits: ``(n,)``.
        order: The numbers of those drawn, first to last (Plackett-Luce).

    Example:
        >>> log_order_slope(torch.zeros(2), torch.tensor([0]))
        tensor([ 0.5000, -0.5000])
    """
    slope, left = torch.zeros_like(logits), torch.zeros_like(logits)
    for i in order.tolist():
        slope -= torch.softmax(logits + left, 0)
        slope[i] += 1
        left[i] = -torch.inf
    return slope
