"""Go from one model towards another by the same small step in every entry, so that near entries are swapped."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import merge_method
from modicum.types import NonNegative
from modicum.weights.kernels.blocks import fold


@merge_method("nearswap", laws={"bounded", "zero_delta", "shift", "transpose"}, most=1, two=True)
def nearswap(base: Tensor, experts: Sequence[Tensor], *, t: NonNegative) -> Tensor:
    r"""Cut every entry of the delta at the same magnitude.

    .. math::
        \theta = \theta_0 + \max(-t, \min(t, \theta_1 - \theta_0))

    Entries that differ by at most t become the expert's; all others move by t towards it.

    Args:
        base: The tensor to start from.
        experts: One tensor, to go to.
        t: The largest change of an entry, at least 0.

    Returns:
        The merged tensor.

    Example:
        >>> import torch
        >>> nearswap(torch.zeros(3), [torch.tensor([0.01, -0.5, 2.0])], t=0.1)
        tensor([ 0.0100, -0.1000,  0.1000])

    Cost:
        One pass.

    Deviates:
        The published form weighs by t over the difference, which is the same but for differences below 1e-6.

    Reference:
        Alchemonaut, "QuartetAnemoi-70B-t0.0001", model card on the Hugging Face Hub, 2024.
    """
    return fold(base, experts, lambda deltas: deltas[0].clamp_(-t, t))
