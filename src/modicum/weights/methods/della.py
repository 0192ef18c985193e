"""Drop small entries more often than large ones, make the rest larger, then elect signs.

Between DARE, which drops at random, and TIES, which drops the smallest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import as_vector, per_expert, working_dtype
from modicum.weights.combine import Elect, combine
from modicum.weights.draws import LEVELS, draw

ROWS = 1 << 17  # entries handled at a time, in whole rows


@merge_method("della", paper="arXiv:2406.11617", laws={"zero_delta", "scale"})
def della(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    density: Fraction | list[Fraction],
    epsilon: Annotated[float, Ge(0), Lt(0.5)] | list[float] = 0.1,
    rescale: Literal["probability", "l1", "none"] = "probability",
    elect: Elect = "ties",
    scale: float = 1.0,
    weights: list[float] | None = None,
    normalize: bool = True,
    rng: torch.Generator | None = None,
) -> Tensor:
    r"""Keep each entry with a probability that grows with its rank in its row, rescale, and combine.

    .. math::
        q_i = (d - \epsilon) + 2 \epsilon \frac{r_i}{n - 1}, \quad
        \tilde\tau_i = m_i \tau_i / q_i, \quad m_i \sim \operatorname{Bernoulli}(q_i)

    where :math:`r_i` is the rank of :math:`|\tau_i|` in its row of :math:`n`, smallest first.

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        density: Mean probability of being kept (d), in (0, 1]; one value or one for each. At 1 nothing is dropped.
        epsilon: Half the width of the probabilities; ``density ± epsilon`` must lie within (0, 1).
        rescale: ``probability`` divides each entry by its q, as published; ``l1`` makes the sum of magnitudes of the
            tensor what it was; ``none`` leaves what is kept as it is.
        elect: ``ties`` sums only the deltas that have the elected sign; ``none`` sums all.
        scale: Factor on the merged delta.
        weights: One for each expert; all 1 when not given.
        normalize: Divide by the weights that took part.
        rng: Draws the masks; a fixed one when not given.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: ``density ± epsilon`` leaves (0, 1), or the number of weights or densities is wrong.

    Example:
        >>> import torch
        >>> rng, expert = torch.Generator().manual_seed(1), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> della(torch.zeros(1, 4), [expert], density=0.5, epsilon=0.25, rng=rng)
        tensor([[0.0000, 0.0000, 5.1429, 5.3333]])

    Cost:
        One sort of every row; one pass, two with ``l1``.

    Deviates:
        ``epsilon`` is half the window, as in the authors' code; the paper's is the whole. Probabilities are rounded to
        1/65536, and the rescaling uses the rounded ones, so it stays unbiased. A row of one entry is kept
        with probability ``density``.

    Reference:
        Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024,
        arXiv:2406.11617, Section 3.
    """
    n = len(experts)
    shares, widths = per_expert(density, n), per_expert(epsilon, n)
    for share, width in zip(shares, widths):
        if share < 1 and not 0 < share - width <= share + width < 1:
            raise RecipeError(
                f"della: density {share} ± epsilon {width} leaves (0, 1). Lower epsilon, or move density to the middle."
            )
    seeds = torch.randint(1 << 62, (n,), generator=rng or torch.Generator().manual_seed(0)).tolist()
    w = as_vector(per_expert(weights, n), base)
    dtype = working_dtype(base)
    width_of_row = base.shape[-1] if base.ndim else 1
    origin = base.reshape(-1, width_of_row)
    flats = [expert.reshape(-1, width_of_row) for expert in experts]
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    rows = out.view(-1, width_of_row)
    step = max(1, ROWS // max(1, width_of_row))
    ratios = _l1_ratios(origin, flats, shares, widths, seeds, step) if rescale == "l1" else None
    generators = [np.random.default_rng(seed) for seed in seeds]
    for start in range(0, len(origin), step):
        block = origin[start : start + step].to(dtype)
        deltas = torch.empty(n, *block.shape, dtype=dtype, device=base.device)
        for t, flat in enumerate(flats):
            delta = flat[start : start + step].to(dtype) - block
            deltas[t] = prune(delta, shares[t], widths[t], generators[t], by_probability=rescale == "probability")
            if ratios is not None:
                deltas[t] *= ratios[t]
        merged = combine(deltas.view(n, -1), w, elect=elect, normalize=normalize).view(block.shape)
        rows[start : start + step] = block + scale * merged
    return out


def prune(delta: Tensor, density: float, epsilon: float, rng: np.random.Generator, *, by_probability: bool) -> Tensor:
    """Drop entries of each row of ``delta`` at random, small ones more often; divide the rest by their probability."""
    if density >= 1:
        return delta
    rows, n = delta.shape
    slope = 2 * epsilon / (n - 1) if n > 1 else 0.0
    probability = (density - epsilon if n > 1 else density) + slope * np.arange(n)
    levels = np.clip(np.rint(probability * LEVELS), 1, LEVELS - 1).astype(np.uint16)
    factor = np.float32(LEVELS) / levels if by_probability else np.ones(n)
    factors = (draw(rows * n, rng).reshape(rows, n) < levels) * factor.astype(np.float32)
    # Magnitude and position in one integer, the position in its lower half: sorting it ranks a row, equal magnitudes
    # by position, far faster than an argsort.
    keys = np.empty((rows, n), np.int64)
    halves = keys.view(np.int32).reshape(rows, n, 2)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    halves[:, :, low] = np.arange(n)
    halves[:, :, high] = delta.abs().float().cpu().numpy().view(np.int32)
    keys.sort(axis=1)
    keys &= 0xFFFFFFFF
    spread = torch.empty(rows, n).scatter_(1, torch.from_numpy(keys), torch.from_numpy(factors))
    return delta.mul_(spread.to(delta))


def _l1_ratios(
    base: Tensor,
    experts: Sequence[Tensor],
    shares: Sequence[float],
    widths: Sequence[float],
    seeds: Sequence[int],
    step: int,
) -> list[float]:
    ratios = []
    for expert, share, width, seed in zip(experts, shares, widths, seeds):
        rng, before, after = np.random.default_rng(seed), 0.0, 0.0
        for start in range(0, len(base), step):
            delta = expert[start : start + step].to(working_dtype(base)) - base[start : start + step]
            before += float(delta.abs().sum(dtype=torch.float64))
            pruned = prune(delta, share, width, rng, by_probability=False)
            after += float(pruned.abs().sum(dtype=torch.float64))
        ratios.append(before / after if after else 1.0)
    return ratios
