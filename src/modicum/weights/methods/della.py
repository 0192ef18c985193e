"""Drop small entries more often than large ones, make the rest larger, then elect signs.

Between DARE, which drops at random, and TIES, which drops the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import as_vector, per_expert
from modicum.weights.combine import Elect, combiner
from modicum.weights.draws import LEVELS, Words, draw, merge_dropped

SHORT = 14  # bits of a column up to which it shares 32 bits with its magnitude, whose mantissa keeps 10 or more


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

    where :math:`r_i` is the rank of :math:`|\tau_i|` in its row of :math:`n`, smallest first; equal magnitudes are
    ranked at random.

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
        One sort of every row; one pass, two with ``l1``, which keeps a bit for each entry of each expert between them.

    Deviates:
        ``epsilon`` is half the window, as in the authors' code; the paper's is the whole. Probabilities are rounded to
        1/65536, and the rescaling uses the rounded ones, so it stays unbiased. Magnitudes that agree to ten binary
        digits may count as equal. A row of one entry is kept with probability ``density``.

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
    sources = [np.random.default_rng(seed) for seed in seeds]
    row = base.shape[-1] if base.ndim else 1
    levels = [levels_of(row, *window) for window in zip(shares, widths)]

    def drop(t: int, delta: Tensor) -> NDArray[Any] | None:
        chances = levels[t]
        if chances is None:
            return None
        return drop_by_rank(delta.view(-1, row), chances, sources[t], divide=rescale == "probability").reshape(-1)

    combine = combiner(as_vector(per_expert(weights, n), base), elect=elect, normalize=normalize, scale=scale)
    return merge_dropped(base, experts, drop, combine, larger=None if rescale == "l1" else [1.0] * n, row=row)


@lru_cache(maxsize=64)  # a model has few lengths of row
def levels_of(n: int, density: float, epsilon: float) -> Words | None:
    """Return the probabilities of being kept in a row of ``n``, smallest entry first, in units of 1/65536.

    ``None`` where nothing is dropped.
    """
    if density >= 1 or not n:
        return None
    probability = density + epsilon * np.linspace(-1, 1, n) if n > 1 else np.array([density])
    return np.clip(np.rint(probability * LEVELS), 1, LEVELS - 1).astype(np.uint16)


def drop_by_rank(delta: Tensor, levels: Words, rng: np.random.Generator, *, divide: bool) -> NDArray[Any]:
    """Return for each entry of the rows ``delta (rows, n)`` whether it stays, over its probability if ``divide``."""
    columns = _rank(delta, rng)
    stays = draw(delta.numel(), rng).reshape(columns.shape) < levels
    by_rank = torch.from_numpy(stays * (np.float32(LEVELS) / levels) if divide else stays)
    return torch.empty_like(by_rank).scatter_(1, columns, by_rank).numpy()


def _rank(delta: Tensor, rng: np.random.Generator) -> Tensor:
    """Return for each row of ``delta (rows, n)`` its columns in the order of their magnitudes, equal ones at random.

    Magnitude and column in one integer: sorting these in place is far faster than an argsort. The bit pattern of a
    number without its sign is ordered like its magnitude. Of columns that are written with a random pattern of bits
    flipped, each of two is as often the smaller.
    """
    patterns = delta.float().cpu().numpy().view(np.uint32)
    rows, n = patterns.shape
    bits = (n - 1).bit_length()
    dtype: type[np.unsignedinteger[Any]] = np.uint32 if bits <= SHORT else np.uint64
    column = dtype((1 << bits) - 1)
    flips = rng.integers(column, size=(rows, 1), dtype=dtype, endpoint=True)
    keys = patterns.astype(dtype, copy=False) << dtype(8 * dtype().itemsize - 31)  # the sign falls off
    keys &= ~column
    keys |= np.arange(n, dtype=dtype) ^ flips
    keys.sort(axis=1)
    keys &= column
    keys ^= flips
    return torch.from_numpy(keys.astype(np.int64))
