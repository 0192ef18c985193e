"""The last checkpoint as it is: what a run without averaging gives."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.registry import averager


@averager("last")
def last(checkpoints: Sequence[object]) -> list[float]:
    r"""Take the last checkpoint as it is: the baseline.

    .. math::
        c_n = 1

    Args:
        checkpoints: Oldest first.

    Returns:
        The coefficients.

    Example:
        >>> last(["a", "b"])
        [0.0, 1.0]

    Cost:
        One copy.

    Reference:
        None: the baseline of every other averager.
    """
    return [0.0] * (len(checkpoints) - 1) + [1.0]
