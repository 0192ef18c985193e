"""Drop a random share of each delta, make the rest larger, then add or elect signs.

Fine-tuned deltas are redundant: nine tenths of them can go. It makes several experts collide less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.kernels.blocks import as_vector, per_expert
from modicum.weights.kernels.combine import Elect, combiner
from modicum.weights.kernels.draws import LEVELS, Mask, draw_mask, generators, levels, merge_dropped


@merge_method("dare", paper="arXiv:2311.03099", laws={"bounded", "zero_delta", "scale", "shift"})
def dare(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Fraction | list[Fraction],
    rescale: Literal["expectation", "l1", "none"] = "expectation",
    elect: Elect = "none",
    scale: float = 1.0,
    weights: list[float] | None = None,
    normalize: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Keep each entry of a delta with probability ``density``, rescale, and combine.

    .. math::
        \tilde\tau_t = \frac{m_t \odot \tau_t}{q_t}, \quad m_t \sim \operatorname{Bernoulli}(q_t), \quad
        \theta = \theta_0 + \lambda \sum_t w_t \tilde\tau_t

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        density: Probability of being kept (q; the paper's drop rate is 1 − q), in (0, 1]; one value or one for each.
        rescale: ``expectation`` divides by q, as published; ``l1`` makes the sum of magnitudes what it was.
        elect: ``ties`` sums only the deltas that have the elected sign, as in TIES.
        scale: Factor on the merged delta.
        weights: One for each expert; all 1 when not given.
        normalize: Divide by the weights that took part.
        generator: Draws the masks; a fixed one when not given.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: The number of weights or densities is wrong.

    Example:
        >>> import torch
        >>> dare(torch.zeros(4), [torch.ones(4)], density=0.5, generator=torch.Generator().manual_seed(5))
        tensor([2., 2., 0., 0.])

    Cost:
        One pass; two with ``l1``, which keeps a bit for each entry of each expert between them.

    Deviates:
        A tensor's probability is one of the two multiples of 1/65536 around the density, drawn so that it is exact on
        average, and 1/65536 at least.

    Reference:
        Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML
        2024, arXiv:2311.03099, Equation 1.
    """
    n = len(experts)
    w = as_vector(per_expert(weights, n), base)
    shares, sources = per_expert(density, n, name="density"), generators(n, generator)
    reached = levels(shares, generator)

    def drop(t: int, size: int, _: Tensor) -> Mask | None:
        return draw_mask(size, reached[t], sources[t]) if reached[t] < LEVELS else None

    factors = {"expectation": [1 / max(share, 1 / LEVELS) for share in shares], "none": [1.0] * n, "l1": None}[rescale]
    combine = combiner(w, elect=elect, normalize=normalize, scale=scale)
    return merge_dropped(base, experts, drop, combine, rescale=factors, blind=True)
