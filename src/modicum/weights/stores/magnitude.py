"""The largest entries of the difference, as they are or stretched to its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.registry import expert_store
from modicum.types import Fraction
from modicum.weights.kernels.combine import kept_of, trim_cuts
from modicum.weights.stores.base import Layout, Values
from modicum.weights.stores.kept import Kept, refuse_seed_only


@expert_store("magnitude", paper="arXiv:2306.01708")
class Magnitude(Kept):
    r"""Keep the entries of largest magnitude as they are; of equal ones those that come first.

    .. math::
        S_i = (\theta_t - D)_i \; [\, i \in \operatorname{top}_{\rho N} |\theta_t - D| \,]

    Args:
        shape: Shape of the tensor.
        density: Share ρ of the entries that is kept, rounded down, at least one.
        layout: How places are written.
        values: Dtype of the values.
        key: Not used.

    Raises:
        RecipeError: ``layout`` is ``seed_only``.

    Example:
        >>> import torch
        >>> Magnitude((4,), density=0.5).encode(torch.zeros(4), torch.tensor([3.0, -1, 2, 0]))["values"].tolist()
        [3.0, 2.0]

    Cost:
        Two passes over the difference to find the threshold, one to write; reading takes a scatter-add.

    Reference:
        Yadav et al., "TIES-Merging", 2023, arXiv:2306.01708, section 3, step 1.
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
        refuse_seed_only(layout, "the largest entries")
        super().__init__(shape, layout=layout, values=values, key=key)
        self.density = density

    def count(self) -> int:
        """Return how many entries are kept."""
        return kept_of(self.numel, self.density) if self.numel else 0

    def keep(self, dense: Tensor, expert: Tensor, delta: NDArray[Any]) -> tuple[NDArray[np.bool_], float]:
        """Return where the largest entries are."""
        # In float32, as the difference is: a cut of float64 numbers would lie between its entries.
        tensors = [t.float() if t.dtype == torch.float64 else t for t in (dense, expert)]
        (cut,) = trim_cuts(tensors[0], tensors[1:], [self.density]) if self.numel else (None,)
        if cut is None:
            return np.ones(self.numel, bool), 1.0
        sizes = np.abs(delta)
        mask = sizes > cut.value
        mask[np.flatnonzero(sizes == cut.value)[: cut.spare]] = True
        return mask, 1.0


@expert_store("magnitude_rescaled", paper="arXiv:2502.04411")
class MagnitudeRescaled(Magnitude):
    r"""Keep the entries of largest magnitude, multiplied so that their magnitudes sum to those of the whole.

    .. math::
        S_i = (\theta_t - D)_i \; [\, i \in K \,] \cdot
              \frac{\sum_j |\theta_t - D|_j}{\sum_{j \in K} |\theta_t - D|_j}

    Args:
        shape: Shape of the tensor.
        density: Share of the entries that is kept, rounded down, at least one.
        layout: How places are written.
        values: Dtype of the values.
        key: Not used.

    Example:
        >>> import torch
        >>> store = MagnitudeRescaled((4,), density=0.5)
        >>> store.encode(torch.zeros(4), torch.tensor([3.0, -1, 2, 0]))["values"].tolist()
        [3.59375, 2.40625]

    Cost:
        That of ``magnitude``.

    Deviates:
        A control of ours for the published random experts: it separates what the rescaling does from what chance does.

    Reference:
        "Mediator", 2025, arXiv:2502.04411.
    """

    def keep(self, dense: Tensor, expert: Tensor, delta: NDArray[Any]) -> tuple[NDArray[np.bool_], float]:
        """Return where the largest entries are, and the share of the whole that they hold, turned over."""
        mask, _ = super().keep(dense, expert, delta)
        sizes = np.abs(delta)
        whole, held = sizes.sum(dtype=np.float64), sizes[mask].sum(dtype=np.float64)
        return mask, float(whole / held) if held else 1.0
