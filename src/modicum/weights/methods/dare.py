"""Drop a random share of each delta, make the rest larger, then add or elect signs.

Fine-tuned deltas are redundant: nine tenths of them can go. It makes several experts collide less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import as_vector, delta_blocks, fold, per_expert
from modicum.weights.combine import Elect, combiner
from modicum.weights.draws import LEVELS, draw_mask, keep_


@merge_method("dare", paper="arXiv:2311.03099", laws={"zero_delta", "scale", "shift"})
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
    rng: torch.Generator | None = None,
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
        rng: Draws the masks; a fixed one when not given.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: The number of weights or densities is wrong.

    Example:
        >>> import torch
        >>> dare(torch.zeros(4), [torch.ones(4)], density=0.5, rng=torch.Generator().manual_seed(5))
        tensor([2., 2., 0., 0.])

    Cost:
        One pass, two with ``l1``.

    Deviates:
        The probability is rounded to 1/65536, and the rescaling uses the rounded one, so it stays unbiased.

    Reference:
        Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", ICML
        2024, arXiv:2311.03099, Equation 1.
    """
    n = len(experts)
    w = as_vector(per_expert(weights, n), base)
    levels = [min(LEVELS, max(1, round(share * LEVELS))) for share in per_expert(density, n)]
    seeds = torch.randint(1 << 62, (n,), generator=rng or torch.Generator().manual_seed(0)).tolist()
    if rescale == "l1":
        factors = _l1_ratios(base, experts, levels, seeds)
    else:
        factors = [LEVELS / level if rescale == "expectation" else 1.0 for level in levels]
    masks = Masks(levels, seeds)
    larger = as_vector(factors, base)

    combine = combiner(w, elect=elect, normalize=normalize, scale=scale)

    def kernel(deltas: Tensor) -> Tensor:
        masks.apply_(deltas)
        return combine(deltas.mul_(larger[:, None]))

    return fold(base, experts, kernel)


class Masks:
    """Random masks of a tensor's deltas, drawn block by block; the same seeds give the same masks."""

    def __init__(self, levels: Sequence[int], seeds: Sequence[int]) -> None:
        self.levels = levels
        self.generators = [np.random.default_rng(seed) for seed in seeds]

    def apply_(self, deltas: Tensor) -> None:
        """Set to zero what is dropped of the next block of deltas ``(n, block)``."""
        for delta, level, rng in zip(deltas, self.levels, self.generators):
            if level < LEVELS:
                keep_(delta, draw_mask(len(delta), level, rng))


def _l1_ratios(base: Tensor, experts: Sequence[Tensor], levels: Sequence[int], seeds: Sequence[int]) -> list[float]:
    """Return for each expert the sum of magnitudes of its delta over that of what its mask keeps."""
    masks = Masks(levels, seeds)
    before = torch.zeros(len(experts), dtype=torch.float64, device=base.device)
    after = torch.zeros_like(before)
    for _, _, deltas in delta_blocks(base, experts):
        before += deltas.abs_().sum(1)
        masks.apply_(deltas)
        after += deltas.sum(1)
    return torch.where(after > 0, before / after, 1.0).tolist()
