"""The mean that weighs a checkpoint by its age, linearly."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.registry import averager


@averager("wma", paper="arXiv:2505.12082")
def wma(checkpoints: Sequence[object]) -> list[float]:
    r"""Average with weights that grow linearly towards the newest.

    .. math::
        c_i = \frac{i}{1 + 2 + \dots + n}

    Args:
        checkpoints: Oldest first.

    Returns:
        The coefficients.

    Example:
        >>> wma(["a", "b", "c", "d"])
        [0.1, 0.2, 0.3, 0.4]

    Cost:
        One pass over the checkpoints.

    Deviates:
        The paper spaces checkpoints by a constant number of tokens; here they lie as they were saved.

    Reference:
        Li et al., "Model Merging in Pre-training of Large Language Models", 2025, arXiv:2505.12082, Section 3.
    """
    n = len(checkpoints)
    return [2 * i / (n * (n + 1)) for i in range(1, n + 1)]
