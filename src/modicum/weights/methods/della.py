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
from modicum.weights.kernels import fused
from modicum.weights.kernels.blocks import as_vector, per_expert
from modicum.weights.kernels.combine import Elect, combiner
from modicum.weights.kernels.draws import LEVELS, Mask, Words, draw, generators, merge_dropped

SHORT = 14  # bits of a column up to which it shares 32 bits with its magnitude, whose mantissa keeps 10 or more


@merge_method("della", paper="arXiv:2406.11617", laws={"bounded", "zero_delta", "scale"})
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
    generator: torch.Generator | None = None,
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
        generator: Draws the masks; a fixed one when not given.

    Returns:
        The merged tensor.

    Raises:
        RecipeError: ``density ± epsilon`` leaves (0, 1), or the number of weights or densities is wrong.

    Example:
        >>> import torch
        >>> rng, expert = torch.Generator().manual_seed(1), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        >>> della(torch.zeros(1, 4), [expert], density=0.5, epsilon=0.25, generator=rng)
        tensor([[0.0000, 0.0000, 5.1429, 5.3333]])

    Cost:
        One pass, two with ``l1``, which keeps a bit for each entry of each expert between them; ``probability`` also
        sorts every row.

    Deviates:
        ``epsilon`` is half the window, as in the authors' code; the paper's is the whole. Probabilities are rounded to
        1/65536, and the rescaling uses the rounded ones, so it stays unbiased. Magnitudes that agree to ten binary
        digits may count as equal. A row of one entry is kept with probability ``density``.

    Reference:
        Deep et al., "DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based Sampling", 2024,
        arXiv:2406.11617, Section 3.
    """
    n = len(experts)
    shares, widths = per_expert(density, n, name="density"), per_expert(epsilon, n, name="epsilon")
    for share, width in zip(shares, widths):
        if share < 1 and not 0 < share - width <= share + width < 1:
            raise RecipeError(
                f"della: density {share} ± epsilon {width} leaves (0, 1). Lower epsilon, or move density to the middle."
            )
    sources = generators(n, generator)
    row = base.shape[-1] if base.ndim else 1

    def drop(t: int, _: int, delta: Tensor) -> NDArray[Any] | None:
        if shares[t] >= 1:
            return None
        choose = divide_by_rank if rescale == "probability" else keep_by_rank
        return choose(delta.view(-1, row), shares[t], widths[t], sources[t]).reshape(-1)

    combine = combiner(as_vector(per_expert(weights, n), base), elect=elect, normalize=normalize, scale=scale)
    return merge_dropped(base, experts, drop, combine, rescale=None if rescale == "l1" else [1.0] * n, row=row)


def keep_by_rank(delta: Tensor, density: float, epsilon: float, rng: np.random.Generator) -> Mask:
    """Say which entries of the rows ``delta (rows, n)`` stay: without ranking them.

    An entry's rank over n - 1 is the share of the others in its row that are smaller, so it is as likely to be larger
    than one of them that is picked at random. That decides for draws within the window of probabilities, by a coin
    where the two are equal; draws outside it decide by themselves.
    """
    size, n = delta.numel(), delta.shape[1]
    width = round(2 * epsilon * LEVELS) if n > 1 else 0
    lowest = min(LEVELS - 1, max(1, round(density * LEVELS - width / 2)))
    draws = draw(size, rng)
    if fused.usable(delta):
        coins = np.count_nonzero(draws - np.uint16(lowest) < width)
        picks = rng.integers(1 << 32, size=coins, dtype=np.uint32)
        return fused.keep_by_rank(delta, n, draws, (lowest, width), picks)
    mask: Mask = draws < lowest
    places = np.flatnonzero(draws - np.uint16(lowest) < width)
    if places.size:
        numbers = delta.reshape(-1).cpu().numpy()
        picks = rng.integers(1 << 32, size=places.size, dtype=np.uint32)
        first = places // n * n  # of each one's row
        other = (picks * np.uint64(n - 1) >> np.uint64(32)).astype(np.int64)
        other += other >= places - first  # itself is left out
        own, rival = np.abs(numbers[places]), np.abs(numbers[first + other])
        mask[places] = (own > rival) | ((own == rival) & (picks & np.uint32(1) > 0))
    return mask


def divide_by_rank(delta: Tensor, density: float, epsilon: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Return for each entry of the rows ``delta (rows, n)`` 0 if it is dropped, else one over its probability."""
    columns = _rank(delta, rng)
    levels = levels_of(columns.shape[1], density, epsilon)
    stays = draw(delta.numel(), rng).reshape(columns.shape) < levels
    by_rank = torch.from_numpy(stays * (np.float32(LEVELS) / levels))
    return torch.empty_like(by_rank).scatter_(1, columns, by_rank).numpy()


@lru_cache(maxsize=64)  # a model has few lengths of row
def levels_of(n: int, density: float, epsilon: float) -> Words:
    """Return the probabilities of being kept in a row of ``n``, smallest entry first, in units of 1/65536."""
    probability = density + epsilon * np.linspace(-1, 1, n) if n > 1 else np.array([density])
    return np.clip(np.rint(probability * LEVELS), 1, LEVELS - 1).astype(np.uint16)


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
