"""One bit for each weight: the sign of the difference, times the mean of its magnitudes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modicum.registry import expert_store
from modicum.weights.files import Spec
from modicum.weights.stores.base import Store, difference


@expert_store("sign", paper="arXiv:2402.10193", scales=True)
class Sign(Store):
    r"""Keep the sign of every entry and one number for each matrix.

    .. math::
        S = \alpha \operatorname{sign}(\theta_t - D), \qquad \alpha = \operatorname{mean} |\theta_t - D|

    where the sign of zero is +1. This α is the one of least squared error.

    Args:
        shape: Shape of the tensor; of a stack of matrices each has an α of its own.
        key: Not used.

    Example:
        >>> import torch
        >>> Sign((4,)).encode(torch.zeros(4), torch.tensor([1.0, -2, 0, 3]))["alpha"].item()
        1.5

    Cost:
        One pass; a sixteenth of the bytes of the weights in bfloat16. Reading adds ±α from a table of 256 bytes.

    Deviates:
        The published method takes the difference from the base; here it is taken from the dense layer, which may be
        the average. What is written is the α of least squared error; ``distil`` of the job ``route`` fits it.

    Reference:
        Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", 2024, arXiv:2402.10193, equations 1 to 4.
    """

    @property
    def specs(self) -> dict[str, Spec]:
        """Shape and dtype of each part."""
        bits = Spec((math.ceil(self.numel / 8),), torch.uint8)
        return {"bits": bits, "alpha": Spec((self.matrices,), torch.float32)}

    def encode(self, dense: Tensor, expert: Tensor) -> dict[str, Tensor]:
        """Return packed signs and α."""
        delta = difference(dense, expert)
        alpha = (
            delta.view(self.matrices, -1).abs().mean(1, dtype=torch.float64).float() if self.numel else torch.zeros(1)
        )
        bits = np.packbits(delta.numpy() >= 0, bitorder="little")
        return {"bits": torch.from_numpy(bits), "alpha": alpha}

    def __init__(self, shape: Sequence[int], *, key: int = 0) -> None:
        super().__init__(shape, key=key)
