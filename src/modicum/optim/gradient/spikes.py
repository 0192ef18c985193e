"""Count the spikes of a series: what a loss curve's jumps come to in one number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.errors import UnsupportedError


@dataclass(frozen=True)
class SpikeReport:
    """Spikes of a series."""

    count: int
    score: float  # per cent of all steps
    steps: tuple[int, ...]  # positions of the spikes
    long_enough: bool  # False when the series is no longer than the window, so that nothing could be a spike


def spike_score(
    values: Float[Tensor, " t"] | Sequence[float], *, window: int = 1000, sigma: float = 10.0, two_sided: bool = True
) -> SpikeReport:
    r"""Return the share of steps that lie ``sigma`` standard deviations off the mean of the ``window`` steps before.

    .. math:: 100 \cdot \frac{1}{T}\,\#\bigl\{t : |x_t - \mu_t| \ge k\,s_t\bigr\}, \quad
        \mu_t, s_t \text{ over } x_{t-w}, \dots, x_{t-1}

    The first ``window`` steps cannot be spikes. In a window without any spread every change is one. A value that is not
    finite is a spike, and later windows leave it out.

    Args:
        values: Losses or gradient norms, one for each step.
        window: :math:`w`, at least 2. Say so when you report a window smaller than 1000.
        sigma: :math:`k`; greater than 0.
        two_sided: Whether a fall counts like a rise.

    Raises:
        UnsupportedError: ``window`` or ``sigma`` is too small.

    Example:
        >>> spike_score([1.0, 1.1, 0.9, 1.0, 5.0, 1.0], window=4).steps
        (4,)

    Reference:
        OLMo team, "2 OLMo 2 Furious", 2025, arXiv:2501.00656; as used in arXiv:2502.11034.
    """
    if window < 2:
        raise UnsupportedError(f"window is {window}, expected 2 or more steps.")
    if not sigma > 0:
        raise UnsupportedError(f"sigma is {sigma}, expected a number greater than 0.")
    x = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
    if len(x) <= window:
        return SpikeReport(0, 0.0, (), long_enough=False)
    past = x.unfold(0, window, 1)[:-1]
    finite = past.isfinite()
    count = finite.sum(1).clamp(min=1)
    mean = past.where(finite, 0).sum(1) / count
    # Deviations from the mean, not a difference of running sums: those lose all digits on a flat curve.
    deviation = ((past - mean[:, None]).where(finite, 0).square().sum(1) / count).sqrt()
    # A constant series has a mean that rounding puts next to it; that is not a deviation.
    noise = torch.finfo(torch.float64).eps * window * mean.abs()
    off = x[window:] - mean
    off = off.abs() if two_sided else off
    spikes = ((off >= sigma * deviation) & (off > noise)) | ~x[window:].isfinite()
    steps = tuple(int(i) + window for i in spikes.nonzero().flatten())
    return SpikeReport(len(steps), 100 * len(steps) / len(x), steps, long_enough=True)
