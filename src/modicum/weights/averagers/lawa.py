"""The plain mean of the latest checkpoints, so that early ones no longer count."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.registry import averager
from modicum.types import PositiveInt
from modicum.weights.averagers.support import check_k


@averager("lawa", paper="arXiv:2209.14981")
def lawa(checkpoints: Sequence[object], *, last: PositiveInt | None = None) -> list[float]:
    r"""Average the latest checkpoints equally.

    .. math::
        c_i = \frac{1}{k}\,[i > n - k]

    Args:
        checkpoints: Oldest first.
        last: How many of the latest (k); 5 when not given, or all where there are fewer.

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``last``.

    Example:
        >>> lawa(["a", "b", "c", "d"], last=2)
        [0.0, 0.0, 0.5, 0.5]

    Cost:
        One pass over ``last`` checkpoints.

    Deviates:
        The paper averages the ends of epochs; how far apart checkpoints lie is decided here when they are saved.

    Reference:
        Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022,
        arXiv:2209.14981, Section 2.
    """
    n = len(checkpoints)
    last = min(5, n) if last is None else last
    check_k("lawa", last, n, knob="last")
    return [0.0] * (n - last) + [1 / last] * last
