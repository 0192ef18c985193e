"""Random entries of the difference, divided by their share: the published sparse experts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.philox import words
from modicum.registry import expert_store
from modicum.types import Fraction
from modicum.weights.stores.base import BLOCK, Layout, Values
from modicum.weights.stores.kept import Kept, store_bytes


def drawn_mask(key: int, start: int, count: int, *, density: float) -> NDArray[np.bool_]:
    """Return which of ``count`` entries from ``start`` on, a multiple of 4, are kept: equal on every machine.

    Example:
        >>> whole = drawn_mask(7, 0, 16, density=0.5)
        >>> bool((drawn_mask(7, 8, 8, density=0.5) == whole[8:]).all())
        True
    """
    found: NDArray[np.int64] = words(torch.tensor([key]), count, start=start)[0].numpy()
    return found < round(density * (1 << 32))


@lru_cache(maxsize=4096)  # asked when the bytes are told, when files are laid out and when they are written
def _count(key: int, numel: int, density: float) -> int:
    if density == 1:
        return numel
    blocks = ((start, min(BLOCK, numel - start)) for start in range(0, numel, BLOCK))
    return sum(int(np.count_nonzero(drawn_mask(key, *block, density=density))) for block in blocks)


@expert_store("random_rescaled", paper="arXiv:2502.04411", drawn=True, unbiased=True)
class RandomRescaled(Kept):
    r"""Keep each entry with probability ``density`` and divide it by that.

    .. math::
        \tilde S_i = m_i (\theta_t - D)_i / \rho, \qquad m_i \sim \operatorname{Bernoulli}(\rho)

    so that the mean over seeds is the difference itself. An entry is kept where its counter-based word is below
    ρ·2³²; the word depends on the key and the entry's place alone.

    Args:
        shape: Shape of the tensor.
        density: Probability ρ that an entry is kept.
        layout: How places are written; ``seed_only`` draws them again when the store is read.
        values: Dtype of the values.
        key: Of the words: a hash of seed, expert and tensor.

    Example:
        >>> store = RandomRescaled((64, 64), density=0.1, key=3)
        >>> store.nbytes == 64 * 64 // 8 + 2 * store.count()
        True

    Cost:
        The words of all entries, about 12 ns an entry and core; reading takes a scatter-add.

    Deviates:
        The paper says sparse experts; that they are random and rescaled, as in DARE, is our reading.

    Reference:
        "Mediator", 2025, arXiv:2502.04411; Yu et al., "Language Models are Super Mario", 2024, arXiv:2311.03099,
        section 3.2.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        density: Fraction = 0.1,
        layout: Layout = "bitmask",
        values: Values = "bf16",
        key: int = 0,
    ) -> None:
        super().__init__(shape, layout=layout, values=values, key=key)
        self.density = density

    def count(self) -> int:
        """Return how many entries are kept."""
        return _count(self.key, self.numel, self.density)

    @property
    def expected_nbytes(self) -> int:
        """Bytes of all parts if as many entries are kept as on average."""
        kept = round(self.density * self.numel)
        return store_bytes(self.shape, kept, layout=self.layout, values=self.values)

    def keep(self, dense: Tensor, expert: Tensor, delta: NDArray[Any]) -> tuple[NDArray[np.bool_], float]:  # noqa: ARG002
        """Return the drawn mask, and one over its share."""
        if self.density == 1:
            return np.ones(self.numel, bool), 1.0
        starts = range(0, self.numel, BLOCK)
        masks = [drawn_mask(self.key, s, min(BLOCK, self.numel - s), density=self.density) for s in starts]
        return np.concatenate(masks) if masks else np.zeros(0, bool), 1 / self.density
