"""Free coefficients on the simplex, learnt by gradient: the strongest rival of choosing some checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from modicum.registry import averager
from modicum.types import Positive, PositiveInt
from modicum.weights.search import Landscape


def work(n: int, batches: int, *, iters: int, **_: Any) -> tuple[int, int, int]:  # noqa: ARG001
    """Return the passes with gradient, and the least and most without."""
    return iters, 0, 0


@averager("simplex", learns="gradient", paper="arXiv:2205.13104", supplied={"report"}, work=work)
def simplex(
    landscape: Landscape,
    checkpoints: Sequence[object],
    *,
    iters: PositiveInt = 150,
    lr: Positive = 0.05,
    report: list[dict[str, Any]] | None = None,
) -> list[float]:
    r"""Descend in logits whose softmax are the coefficients.

    .. math::
        c = \mathrm{softmax}(l), \qquad
        \frac{\partial F}{\partial l_i} = c_i \Big(\frac{\partial F}{\partial c_i}
        - \sum_j c_j \frac{\partial F}{\partial c_j}\Big)

    Args:
        landscape: The loss along the checkpoints.
        checkpoints: Oldest first.
        iters: Steps; each sees one batch.
        lr: Rate of Adam on the logits, which start at zero.
        report: Gets the loss at every step.

    Returns:
        The coefficients.

    Example:
        >>> known = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 10.0)]
        >>> landscape = Landscape(lambda weights, t: (weights["w"] - t).square().sum(), known, [0.75])
        >>> found = simplex(landscape, known)
        >>> round(sum(c * model["w"].item() for c, model in zip(found, known)), 1)
        0.8

    Cost:
        ``iters`` forward and backward passes, each with one mean and n inner products of the weights' size.

    Deviates:
        The paper descends in the span of the checkpoints without bounds, through an orthonormal basis, by SGD at rate
        2; coefficients on the simplex cannot extrapolate.

    Reference:
        Li et al., "Trainable Weight Averaging: Efficient Training by Optimizing Historical Solutions", ICLR 2023,
        arXiv:2205.13104, Section 3.
    """
    logits = torch.zeros(len(checkpoints), dtype=torch.float64)
    optimizer = torch.optim.Adam([logits], lr=lr)
    losses = []
    for step in range(iters if len(checkpoints) > 1 else 0):
        c = logits.softmax(0)
        loss, slope = landscape.gradient(c.tolist(), step)
        logits.grad = c * (slope - (c * slope).sum())
        optimizer.step()
        losses.append(loss)
    if report is not None:
        report.append({"losses": losses})
    return logits.softmax(0).tolist()
