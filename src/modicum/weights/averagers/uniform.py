"""The plain mean of all checkpoints, which every other averager is compared with."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.registry import averager


@averager("uniform", paper="arXiv:1803.05407")
def uniform(checkpoints: Sequence[object]) -> list[float]:
    r"""Average all checkpoints equally.

    .. math::
        c_i = 1 / n

    Args:
        checkpoints: Oldest first.

    Returns:
        The coefficients.

    Example:
        >>> uniform(["a", "b"])
        [0.5, 0.5]

    Cost:
        One pass over the checkpoints.

    Deviates:
        The paper recomputes the statistics of batch normalisation afterwards, which language models do not have.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
        arXiv:1803.05407, Algorithm 1.
    """
    return [1 / len(checkpoints)] * len(checkpoints)
