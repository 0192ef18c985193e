"""The best single checkpoint: what choosing by validation loss gives, without an average."""

from __future__ import annotations

from collections.abc import Sequence

from modicum.registry import averager
from modicum.weights.averagers.support import mean_of
from modicum.weights.search import Landscape


def work(n: int, batches: int) -> tuple[int, int, int]:
    """Return the passes with gradient, and the least and most without."""
    return 0, n * batches, n * batches


@averager("best", learns="value", work=work)
def best(landscape: Landscape, checkpoints: Sequence[object]) -> list[float]:
    r"""Take the checkpoint of the lowest loss; of equal ones the newest.

    .. math::
        c_i = [i = \arg\min_j F(\theta_j)]

    Args:
        landscape: The loss along the checkpoints.
        checkpoints: Oldest first.

    Returns:
        The coefficients.

    Example:
        >>> import torch
        >>> known = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 2.0)]
        >>> best(Landscape(lambda weights, t: (weights["w"] - t).square().sum(), known, [0.8]), known)
        [0.0, 1.0, 0.0]

    Cost:
        n forward passes for each batch.

    Reference:
        None: the usual choice of a model by its validation loss.
    """
    n = len(checkpoints)
    losses = [landscape.value(mean_of([i], n)) for i in range(n)]
    return mean_of([min(range(n), key=lambda i: (losses[i], -i))], n)
