"""The difference itself, for what is too small or too delicate to compress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from modicum.registry import expert_store
from modicum.weights.files import Spec
from modicum.weights.stores.base import FLOATS, Store, difference


@expert_store("whole", paper="arXiv:2502.04411", unbiased=True)
class Whole(Store):
    r"""Keep every entry of the difference.

    .. math::
        S = \theta_t - D

    Norms and biases beside a routed matrix are stored so, whatever the store of the matrix.

    Args:
        shape: Shape of the tensor.
        values: Dtype of the values.
        key: Not used.

    Example:
        >>> Whole((4, 8)).nbytes
        64

    Cost:
        As many bytes as a whole expert.

    Reference:
        "Mediator", 2025, arXiv:2502.04411: the dense form that its sparse experts are compared with.
    """

    def __init__(self, shape: Sequence[int], *, values: Literal["bf16", "f32"] = "bf16", key: int = 0) -> None:
        super().__init__(shape, key=key)
        self.dtype = FLOATS[values]

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each part."""
        return {"delta": Spec((self.numel,), self.dtype)}

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Return the difference."""
        return {"delta": difference(dense, expert).to(self.dtype)}
