"""Take one model's tensor as it is: for stacking layers of several models.

Used with slices of layers; each slice has one source.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import merge_method


@merge_method("passthrough", laws={"bounded", "propagates"}, base=False, most=1)
def passthrough(base: Tensor | None, experts: Sequence[Tensor], *, scale: float = 1.0) -> Tensor:
    r"""Return the only expert's tensor, times ``scale``.

    .. math::
        \theta = s\, \theta_1

    Args:
        base: Not used.
        experts: One tensor.
        scale: Factor on the tensor.

    Returns:
        The tensor, in the base's dtype when there is a base.

    Example:
        >>> import torch
        >>> passthrough(None, [torch.ones(2)])
        tensor([1., 1.])

    Cost:
        One copy.

    Reference:
        None: stacking layers of several models is folklore.
    """
    expert = experts[0] if base is None else experts[0].to(base.dtype)
    return expert.clone() if scale == 1 else expert.mul(scale)
