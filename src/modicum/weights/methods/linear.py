"""Weighted average of whole models: the model soup.

The simplest merge and a hard one to beat when the experts come from one fine-tuning recipe. It needs no base.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import merge_method
from modicum.weights.kernels.blocks import Sum, as_vector, cancels, fold, per_expert


@merge_method("linear", paper="arXiv:2203.05482", laws={"bounded", "propagates", "permutation", "copies"}, base=False)
def linear(
    base: Tensor | None,
    experts: Sequence[Tensor],
    *,
    weights: list[float] | None = None,
    normalize: bool = True,
) -> Tensor:
    r"""Average the experts with given weights.

    .. math::
        \theta = \frac{\sum_t w_t \theta_t}{\sum_t w_t}

    Args:
        base: Not used, except that the result has its dtype when it is given.
        experts: One tensor of each model.
        weights: One for each expert; all 1 when not given.
        normalize: Divide by the sum of the weights.

    Returns:
        The average.

    Raises:
        RecipeError: The weights sum to zero and should be normalized, or their number is wrong.

    Example:
        >>> import torch
        >>> linear(None, [torch.zeros(2), torch.ones(2)], weights=[1.0, 3.0])
        tensor([0.7500, 0.7500])

    Cost:
        One pass.

    Deviates:
        The paper's soups weigh their members alike; weights are an addition. Computed as the first expert plus weighted
        differences, so that equal experts come out exactly.

    Reference:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", ICML 2022, arXiv:2203.05482, Section 2.
    """
    w = per_expert(weights, len(experts))
    total = sum(w)
    if normalize:
        if cancels(w):
            raise RecipeError(
                f"linear: the weights {w} sum to 0 and cannot be normalized. Change one, or set normalize: false."
            )
        w = [value / total for value in w]
        total = 1.0
    first = experts[0] if base is None else experts[0].to(base.dtype)
    # θ = (Σw)·θ₁ + Σ wₜ(θₜ − θ₁)
    rest = as_vector(w[1:], first)
    return fold(first, experts[1:], Sum(rest), share=total)
