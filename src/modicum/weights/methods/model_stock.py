"""Go from the base towards the experts' average, as far as their agreement says.

Needs no knob: experts that point the same way are averaged, experts at right angles leave the base as it is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.weights.kernels.blocks import fold, gram

FURTHEST = 10.0  # past the base, away from the average
SINGULAR = 1e-6  # of 1 + (N - 1) cos: below it, rounding of the inner products decides


@merge_method(
    "model_stock",
    paper="arXiv:2403.19522",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift", "copies"},
    experts=2,
    bound=10.0,
)
def model_stock(base: Tensor, experts: Sequence[Tensor], *, clamp: bool = True, filter_wise: bool = False) -> Tensor:
    r"""Interpolate between the base and the experts' average by the cosine between their deltas.

    .. math::
        t = \frac{N \cos\theta}{1 + (N - 1) \cos\theta}, \quad
        \theta = t \cdot \frac{1}{N} \sum_t \theta_t + (1 - t)\, \theta_0

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each of at least two experts.
        clamp: Keep t within [0, 1]; experts that point apart otherwise give a t below 0, as far as -10.
        filter_wise: One t for each row, along the last dimension, instead of one for the tensor.

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> model_stock(torch.zeros(2), [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])])
        tensor([0.8284, 0.4142])

    Cost:
        Two passes.

    Deviates:
        For more than two experts the cosine is the mean over pairs; ``clamp`` is ours. Near the pole at
        :math:`\cos\theta = -1/(N-1)`, where rounding decides, t is 0 and the base stays.

    Reference:
        Jang et al., "Model Stock: All we need is just a few fine-tuned models", ECCV 2024, arXiv:2403.19522,
        Equation 2.
    """
    n = len(experts)
    if filter_wise and base.ndim:
        return _by_rows(base, experts, furthest=0.0 if clamp else -FURTHEST)
    products = gram(base, experts)
    norms = products.diagonal().sqrt().clamp_min(1e-12)
    cosines = products / torch.outer(norms, norms)
    above = torch.ones_like(cosines).triu(1) > 0
    cosine = float(cosines[above].mean()) if n > 1 else 1.0
    pole = (
        1 + (n - 1) * cosine
    )  # at least 0 but for rounding: 0 where the deltas sum to nothing, as opposite scalars do
    t = n * cosine / pole if pole > SINGULAR else 0.0
    share = min(1.0, max(0.0 if clamp else -FURTHEST, t))
    return fold(base, experts, lambda deltas: share * deltas.mean(0))


def _by_rows(base: Tensor, experts: Sequence[Tensor], *, furthest: float) -> Tensor:
    n, row = len(experts), base.shape[-1]

    def kernel(deltas: Tensor) -> Tensor:
        parts = deltas.view(n, -1, row)
        units = torch.nn.functional.normalize(parts.double(), dim=-1, eps=1e-12)
        # |Σ u|² = Σ |u|² + 2 Σ cos over pairs
        pairs = (units.sum(0).square().sum(-1) - units.square().sum((0, -1))) / (n * (n - 1))
        pole = 1 + (n - 1) * pairs
        t = torch.where(pole > SINGULAR, n * pairs / pole.clamp_min(SINGULAR), 0.0).clamp(furthest, 1.0)
        return (t.to(deltas.dtype)[:, None] * parts.mean(0)).view(-1)

    return fold(base, experts, kernel, row=row)
