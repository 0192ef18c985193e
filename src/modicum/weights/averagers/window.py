"""The contiguous run of checkpoints whose mean is best: an average that does not reach over a break."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modicum.registry import averager
from modicum.types import PositiveInt
from modicum.weights.averagers.support import check_k, mean_of
from modicum.weights.search import Landscape


def work(n: int, batches: int, *, most: int | None = None) -> tuple[int, int, int]:
    """Return the passes with gradient, and the least and most without."""
    values = sum(n - length + 1 for length in range(1, min(most or n, n) + 1)) * batches
    return 0, values, values


@averager("window", learns="value", paper="arXiv:2102.08604", supplied={"report"}, work=work)
def window(
    landscape: Landscape,
    checkpoints: Sequence[object],
    *,
    most: PositiveInt | None = None,
    report: list[dict[str, Any]] | None = None,
) -> list[float]:
    r"""Average the contiguous window whose mean has the lowest loss; of equal ones the longer, then the newer.

    .. math::
        (a, b) = \arg\min_{a \le b} F\Big(\tfrac{1}{b - a + 1} \sum_{i=a}^{b} \theta_i\Big)

    Args:
        landscape: The loss along the checkpoints.
        checkpoints: Oldest first.
        most: Longest window.
        report: Gets the loss of every window.

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``most``.

    Example:
        >>> import torch
        >>> known = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 2.0, 10.0)]
        >>> window(Landscape(lambda weights, t: (weights["w"] - t).square().sum(), known, [1.5]), known)
        [0.0, 0.5, 0.5, 0.0]

    Cost:
        n(n + 1)/2 forward passes for each batch, fewer with ``most``; ``quadratic`` ranks all windows from n + 1
        gradients.

    Deviates:
        The paper finds start and end of the window by thresholds on the validation loss along the run; here every
        window is tried.

    Reference:
        Cha et al., "SWAD: Domain Generalization by Seeking Flat Minima", NeurIPS 2021, arXiv:2102.08604, Section 3.3.
    """
    n = len(checkpoints)
    if most is not None:
        check_k("window", most, n, knob="most")
    losses = {
        (start, length): landscape.value(mean_of(range(start, start + length), n))
        for length in range(1, (most or n) + 1)
        for start in range(n - length + 1)
    }
    if report is not None:
        report.append({"windows": [[start, length, loss] for (start, length), loss in losses.items()]})
    start, length = min(losses, key=lambda at: (losses[at], -at[1], -at[0]))
    return mean_of(range(start, start + length), n)
