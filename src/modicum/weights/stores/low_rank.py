"""The difference as a product of two thin matrices: cut from its singular values, or an adapter's own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import expert_store
from modicum.types import Fraction, PositiveInt
from modicum.weights.files import Spec
from modicum.weights.stores.base import Store, difference


@expert_store("low_rank", paper="arXiv:2406.15479")
class LowRankStore(Store):
    r"""Keep the largest singular values and vectors of the difference.

    .. math::
        S = B A, \qquad B = U_r \Sigma_r^{1/2}, \quad A = \Sigma_r^{1/2} V_r^\top

    A vector has no singular values to drop and is kept whole.

    Args:
        shape: Shape of the tensor.
        density: Without ``rank``, the rank whose factors hold this share of the matrix' entries, at least 1.
        rank: Rank of the factors.
        key: Not used.

    Example:
        >>> LowRankStore((576, 1536), density=0.1).rank, LowRankStore((576, 1536), rank=8).nbytes
        (41, 33792)

    Cost:
        A singular value decomposition of each matrix in float64; reading takes a product of the factors.

    Reference:
        Lu et al., "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging", 2024, arXiv:2406.15479,
        section 4.
    """

    def __init__(
        self, shape: Sequence[int], *, density: Fraction = 0.1, rank: PositiveInt | None = None, key: int = 0
    ) -> None:
        super().__init__(shape, key=key)
        self.height, self.width = (self.shape[-2], self.shape[-1]) if len(self.shape) > 1 else (1, self.columns)
        fitting = int(density * self.height * self.width / max(1, self.height + self.width))
        self.rank = min(rank or max(1, fitting), self.height, self.width)

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each part."""
        batch = self.shape[:-2]
        return {
            "A": Spec((*batch, self.rank, self.width), torch.bfloat16),
            "B": Spec((*batch, self.height, self.rank), torch.bfloat16),
        }

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Return the factors."""
        delta = difference(dense, expert).view(*self.shape[:-2], self.height, self.width)
        u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
        root = s[..., : self.rank].sqrt()
        a, b = root[..., None] * v[..., : self.rank, :], u[..., : self.rank] * root[..., None, :]
        return {"A": a.to(torch.bfloat16), "B": b.to(torch.bfloat16)}


@expert_store("lora", paper="arXiv:2106.09685", factors=True)
class LoraStore(Store):
    r"""Keep the factors of an adapter as they are.

    .. math::
        S = s B A

    with the adapter's scale s. Exact, and smaller than any other store: the dense layer is the base.

    Args:
        shape: Shape of the tensor.
        key: Not used.

    Raises:
        RecipeError: A tensor that no adapter's factors change is to be encoded.

    Example:
        >>> LoraStore((4, 8)).with_factors(torch.ones(2, 8), torch.ones(4, 2), 0.5).nbytes
        100

    Cost:
        2·r·(m + n) bytes in bfloat16; reading takes a product of the factors, or none where they run beside the weight.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, section 4.1.
    """

    def __init__(self, shape: Sequence[int], *, key: int = 0) -> None:
        super().__init__(shape, key=key)
        self._factors: dict[str, Tensor] = {}

    def with_factors(self, a: Tensor, b: Tensor, scale: float) -> LoraStore:
        """Give the adapter's factors, ``a`` (r, in) and ``b`` (out, r), and their scale."""
        self._factors = {"A": a.contiguous(), "B": b.contiguous(), "scale": torch.tensor([scale], dtype=torch.float32)}
        return self

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each part."""
        return {name: Spec(tuple(part.shape), part.dtype) for name, part in self._factors.items()}

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the factors."""
        if not self._factors:
            raise RecipeError("store lora keeps adapters' factors, and an expert is a whole model. Use sign.")
        return dict(self._factors)
