"""The moving average whose memory grows with the run, set by its width relative to the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modicum.errors import RecipeError
from modicum.registry import averager
from modicum.types import Positive

WIDEST = 1 / math.sqrt(12)  # of the uniform mean


@averager("power_ema", paper="arXiv:2312.02696")
def power_ema(checkpoints: Sequence[object], *, sigma_rel: Positive = 0.1) -> list[float]:
    r"""Average by a power of the age, as if a moving average had been kept from the first step on.

    .. math::
        c_i \propto i^{\gamma + 1} - (i - 1)^{\gamma + 1}, \qquad
        \sigma_{\mathrm{rel}} = \sqrt{\frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}}

    Args:
        checkpoints: Oldest first, equally spaced over the run.
        sigma_rel: Width of the profile as a share of the run, up to 1/√12 ≈ 0.2887, which is the uniform mean.

    Returns:
        The coefficients.

    Raises:
        RecipeError: The profile would be wider than the run.

    Example:
        >>> [round(c, 4) for c in power_ema(["a", "b", "c", "d"], sigma_rel=0.2357022604)]
        [0.0625, 0.1875, 0.3125, 0.4375]

    Cost:
        One pass over the checkpoints.

    Deviates:
        The paper keeps moving averages at every step and combines them afterwards; here saved checkpoints are weighted
        by the profile itself, each standing for the steps since the one before.

    Reference:
        Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", CVPR 2024, arXiv:2312.02696,
        Section 3.1.
    """
    if sigma_rel > WIDEST * (1 + 1e-9):
        raise RecipeError(f"power_ema: sigma_rel is {sigma_rel:g}, expected at most {WIDEST:.4f}, the uniform mean.")
    gamma, n = exponent(sigma_rel), len(checkpoints)
    return [(i / n) ** (gamma + 1) - ((i - 1) / n) ** (gamma + 1) for i in range(1, n + 1)]


def exponent(sigma_rel: float) -> float:
    """Return the exponent of the profile of a relative width, by bisection.

    Example:
        >>> round(exponent(0.1), 2)
        6.94
    """
    low, high = 0.0, 1.0

    def width(gamma: float) -> float:
        return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))

    while width(high) > sigma_rel:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2
