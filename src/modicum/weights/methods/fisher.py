"""Average models with a weight for each entry: how much the loss of its expert depends on it.

Needs statistics that were collected on each expert's data: the mean square of the gradient of every parameter, kept as
a checkpoint of the same names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Positive
from modicum.weights.kernels.blocks import per_expert, working_dtype
from modicum.weights.statistics import required


@merge_method(
    "fisher",
    paper="arXiv:2111.09832",
    laws={"bounded", "copies"},
    base=False,
    supplied={"statistics"},
    statistics="required",
    measure="fisher",
    floats=7.0,
)
def fisher(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    weights: list[float] | None = None,
    floor: Positive = 1e-6,
    statistics: Sequence[Tensor] | None = None,
) -> Tensor:
    r"""Average the experts with their diagonal Fisher information as weights.

    .. math::
        \theta_i = \frac{\sum_t w_t F_{t,i}\, \theta_{t,i}}{\sum_t w_t F_{t,i}}

    Args:
        base: Not used, except that the result has its dtype when it is given.
        experts: One tensor of each model.
        weights: One for each expert; all 1 when not given.
        floor: Least Fisher information of an entry; keeps entries that no expert needs at their plain average.
        statistics: Each expert's mean squared gradients, of the tensor's shape.

    Returns:
        The average.

    Raises:
        RecipeError: There are no statistics, or not as many as experts.

    Example:
        >>> import torch
        >>> needs = [torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0])]
        >>> fisher(None, [torch.zeros(2), torch.ones(2)], statistics=needs)
        tensor([0.2500, 0.5000])

    Cost:
        One pass over models and statistics.

    Deviates:
        ``floor`` is ours: where no expert's loss depends on an entry, 0 / 0 becomes the plain average. A tensor that
        was not measured at all is averaged too, and the merge's notes say so.

    Reference:
        Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv:2111.09832, Equation 4.
    """
    like = experts[0] if base is None else base
    dtype = working_dtype(like)
    found = required("fisher", statistics, len(experts))
    first = experts[0].to(dtype)
    total, moved = torch.zeros_like(first), torch.zeros_like(first)
    for expert, information, weight in zip(experts, found, per_expert(weights, len(experts))):
        importance = weight * information.to(dtype).clamp_min(floor)
        moved += importance * (expert.to(dtype) - first)
        total += importance
    return (first + moved / total).to(like.dtype)
