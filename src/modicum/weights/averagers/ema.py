"""The exponential moving average, taken over the checkpoints that were saved."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.registry import averager
from modicum.types import Decay


@averager("ema")
def ema(checkpoints: Sequence[object], *, decay: Decay = 0.8) -> list[float]:
    r"""Average with weights that fade by a constant factor into the past.

    .. math::
        c_1 = \beta^{n-1}, \quad c_i = (1 - \beta)\,\beta^{n-i} \text{ for } i > 1

    Args:
        checkpoints: Oldest first.
        decay: What one step back is multiplied by (beta), in [0, 1); 0 takes the last alone.

    Returns:
        The coefficients.

    Example:
        >>> ema(["a", "b", "c"], decay=0.5)
        [0.25, 0.25, 0.5]

    Cost:
        One pass over the checkpoints.

    Deviates:
        The reference averages all iterates alike. This moving average starts at the first checkpoint and is updated
        with each further one.

    Reference:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
        Optimization 30(4), 1992, for averaging; the exponential form is folklore.
    """
    n = len(checkpoints)
    return [decay ** (n - 1)] + [(1 - decay) * decay ** (n - i) for i in range(2, n + 1)]
