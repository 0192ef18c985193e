"""Drop small entries more often than large ones, make the rest larger, then elect signs.

Between DARE, which drops at random, and TIES, which drops the smallest.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Lt
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.types import Fraction
from modicum.weights.blocks import as_vector, per_expert, working_dtype
from modicum.weights.combine import Elect, combiner
from modicum.weights.draws import LEVELS, Mask, Words, draw, keep_

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

    where :math:`r_i` is the rank of :math:`|\tau_i|` in its row of :math:`n`, smallest first; equal magnitudes share
    their mean rank.

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
    combine = combiner(w, elect=elect, normalize=normalize, scale=scale)
    levels = [levels_of(width_of_row, *window) for window in zip(shares, widths)]
    generators = [np.random.default_rng(seed) for seed in seeds]
    masks: list[list[NDArray[np.uint8]]] = [[] for _ in experts]
    ratios = [1.0] * n
    if rescale == "l1":
        for t, chances in enumerate(levels):
            if chances:
                masks[t], ratios[t] = _l1(origin, flats[t], chances, generators[t], step)
    buffer = torch.empty(n + 1, min(step, len(origin)), width_of_row, dtype=dtype, device=base.device)
    for i, start in enumerate(range(0, len(origin), step)):
        block, *deltas = buffer[:, : len(origin) - start]
        block.copy_(origin[start : start + step])
        for delta, flat, chances, source, bits, ratio in zip(deltas, flats, levels, generators, masks, ratios):
            delta.copy_(flat[start : start + step]).sub_(block)
            if not chances:
                continue
            if rescale == "probability":
                keep_by_probability_(delta, chances, source)
                continue
            mask = np.unpackbits(bits[i], count=delta.numel()) if bits else keep_mask(delta, chances, source)
            keep_(delta.view(-1), mask).mul_(ratio)
        merged = combine(buffer[1:, : len(block)].flatten(1))
        rows[start : start + step] = block.add_(merged.view(block.shape))
    return out


@lru_cache(maxsize=64)  # a model has few lengths of row
def levels_of(n: int, density: float, epsilon: float) -> Levels | None:
    """Return the probabilities of being kept in a row of ``n``; ``None`` where nothing is dropped."""
    if density >= 1 or not n:
        return None
    twice = np.arange(2 * n - 1)
    probability = density + (epsilon * (twice / (n - 1) - 1) if n > 1 else 0.0 * twice)
    levels = np.clip(np.rint(probability * LEVELS), 1, LEVELS - 1).astype(np.uint16)
    by_rank = levels[::2]
    lowest, highest = int(by_rank[0]), int(by_rank[-1])
    return Levels(levels, lowest, highest, np.searchsorted(by_rank, np.arange(lowest, highest), side="right"))


class Levels(NamedTuple):
    """Probabilities in units of 1/65536, by twice the rank, which of equal magnitudes is a whole number and a half."""

    by_twice_rank: Words
    lowest: int
    highest: int
    needed: NDArray[np.int64]  # for each draw from the lowest up, the first rank that keeps it


def keep_mask(delta: Tensor, levels: Levels, rng: np.random.Generator) -> Mask:
    """Say which entries of each row of ``delta`` stay; small ones do less often.

    Draws outside the window of probabilities decide by themselves. For one within it, the entry is compared with the
    one at the rank that would just stay; its own rank is looked up only where the two are equal.
    """
    rows, n = delta.shape
    draws = draw(rows * n, rng)
    mask: Mask = draws < levels.lowest
    open_ = np.flatnonzero((draws < levels.highest) ^ mask)
    if open_.size:
        patterns = _patterns(delta)
        ranked = np.sort(patterns, axis=1)
        row = open_ // n
        own = patterns.reshape(-1)[open_]
        just = ranked.reshape(-1)[row * n + levels.needed[draws[open_] - levels.lowest]]
        mask[open_] = own > just
        equal = np.flatnonzero((own == just) & (own > 0))  # what is zero stays so
        level = levels.by_twice_rank[_twice_rank(ranked, row[equal], own[equal])]
        mask[open_[equal]] = draws[open_[equal]] < level
    return mask


def keep_by_probability_(delta: Tensor, levels: Levels, rng: np.random.Generator) -> None:
    """Drop what :func:`keep_mask` drops, and divide the rest by the probabilities of being kept."""
    own = _level_of_each(_patterns(delta), levels)
    draws = draw(own.size, rng).reshape(own.shape)
    delta.mul_(torch.from_numpy((draws < own) * (np.float32(LEVELS) / own)).to(delta))


def _level_of_each(patterns: NDArray[np.int32], levels: Levels) -> Words:
    """Return the probability of each entry of each row, in units of 1/65536.

    Magnitude and position in one integer: sorting these ranks a row far faster than an argsort, and twice as fast where
    they fit into 32 bits. They do for differences of bfloat16 weights, of which few have bits as low as are cut off.
    """
    cut = max(0, int(patterns.max(initial=0)).bit_length() + _bits(patterns) - 32)
    low = np.flatnonzero((patterns & ((1 << cut) - 1)) != 0)
    if low.size > patterns.size // 256:
        return _by_rank(patterns, levels, np.uint64)
    short = patterns >> cut
    found = _by_rank(short, levels, np.uint32)
    # Two magnitudes that differ in the bits cut off would count as equal: a row that has any is ranked again.
    row = low // patterns.shape[1]
    alike = (short[row] == short.reshape(-1)[low, None]).sum(1) > 1
    again = np.unique(row[alike])
    found[again] = _by_rank(patterns[again], levels, np.uint64)
    return found


def _by_rank(patterns: NDArray[np.int32], levels: Levels, dtype: type[np.unsignedinteger[Any]]) -> Words:
    rows, n = patterns.shape
    bits = _bits(patterns)
    keys = (patterns.astype(dtype) << bits) | np.arange(n, dtype=dtype)
    keys.sort(axis=1)
    magnitudes = keys >> bits
    begins = np.ones((rows, n), bool)  # of each rank: whether another magnitude begins there
    np.not_equal(magnitudes[:, 1:], magnitudes[:, :-1], out=begins[:, 1:])
    first = np.flatnonzero(begins)
    length = np.diff(first, append=rows * n)
    level = levels.by_twice_rank[2 * (first - first // n * n) + length - 1]
    by_rank = torch.from_numpy(np.repeat(level, length).view(np.int16)).view(rows, n)
    position = torch.from_numpy((keys & dtype((1 << bits) - 1)).astype(np.int64))
    return torch.empty(rows, n, dtype=torch.int16).scatter_(1, position, by_rank).numpy().view(np.uint16)


def _bits(patterns: NDArray[np.int32]) -> int:
    """Return how many bits a position in a row takes."""
    return (patterns.shape[1] - 1).bit_length()


def _patterns(delta: Tensor) -> NDArray[np.int32]:
    """Return the bit patterns of the magnitudes, which are ordered like these and sort faster."""
    patterns: NDArray[np.int32] = delta.abs().float().cpu().numpy().view(np.int32)
    return patterns


def _twice_rank(ranked: NDArray[np.int32], row: NDArray[np.int64], own: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return for entries ``own`` of the given rows twice their mean rank among the sorted entries of these."""
    rows, n = ranked.shape
    # With its row in the upper half of an integer, all rows are one sorted sequence.
    keys = (np.arange(rows, dtype=np.int64)[:, None] << 32) + ranked
    wanted = (row << 32) + own
    first, behind = (np.searchsorted(keys.reshape(-1), wanted, side=side) for side in ("left", "right"))
    return first + behind - 1 - 2 * n * row


def _l1(
    base: Tensor, expert: Tensor, levels: Levels, rng: np.random.Generator, step: int
) -> tuple[list[NDArray[np.uint8]], float]:
    """Return the masks of an expert's delta, a bit an entry, and its sum of magnitudes over that of what they keep."""
    masks, before, after = [], 0.0, 0.0
    for start in range(0, len(base), step):
        delta = expert[start : start + step].to(working_dtype(base)) - base[start : start + step]
        mask = keep_mask(delta, levels, rng)
        masks.append(np.packbits(mask))
        magnitudes = delta.abs_().view(-1)
        before += float(magnitudes.sum())
        after += float(keep_(magnitudes, mask).sum())
    return masks, before / after if after else 1.0
