"""A quadratic surrogate of the loss, from n + 1 gradients: every subset, window and weighting at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Gt, Le

from modicum.registry import averager
from modicum.types import PositiveInt
from modicum.weights.averagers.support import check_k, mean_of
from modicum.weights.kernels.surrogate import Surrogate
from modicum.weights.search import Landscape


def work(n: int, batches: int, **_: Any) -> tuple[int, int, int]:
    """Return the passes with gradient, and the least and most without."""
    return (n + 1) * batches, batches, 3 * batches


@averager("quadratic", learns="gradient", supplied={"report"}, work=work)
def quadratic(
    landscape: Landscape,
    checkpoints: Sequence[object],
    *,
    k: PositiveInt | Literal["auto", "simplex"] = "simplex",
    eps: Annotated[float, Gt(0), Le(1)] = 0.1,
    report: list[dict[str, Any]] | None = None,
) -> list[float]:
    r"""Fit a quadratic in the coefficients, choose by it, and evaluate the three best choices.

    .. math::
        F(w) \approx F(u) + c^T (w - u) + \tfrac12 (w - u)^T A (w - u), \qquad
        A e_j \approx \frac{\nabla F(u + \varepsilon (e_j - u)) - \nabla F(u)}{\varepsilon}

    at the uniform mean u, in coordinates that sum to zero. It is exact where the loss is quadratic in the weights.

    Args:
        landscape: The loss along the checkpoints.
        checkpoints: Oldest first.
        k: How many to average equally; ``auto`` takes the best number; ``simplex`` takes unequal weights where they are
            better than the best subset and the best contiguous window.
        eps: How far from the uniform mean gradients are taken, as a share of the way to a single checkpoint.
        report: Gets the surrogate's best loss for every K, its loss of every window, and the choices evaluated.

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``k``.

    Example:
        >>> import torch
        >>> known = [{"w": torch.tensor(x)} for x in ([0.0, 0.0], [1.0, 0.0], [0.0, 1.0])]
        >>> target = torch.tensor([0.2, 0.3])
        >>> landscape = Landscape(lambda weights, t: (weights["w"] - t).square().sum(), known, [target])
        >>> [round(c, 3) for c in quadratic(landscape, known)]
        [0.5, 0.2, 0.3]

    Cost:
        n + 1 gradients and three values, each on all batches; no rate, no temperature and no seed.

    Reference:
        None: a second-order expansion along the checkpoints, of this project.
    """
    n = len(checkpoints)
    if isinstance(k, int):
        check_k("quadratic", k, n)
    if n == 1:
        return [1.0]
    uniform = mean_of(range(n), n)
    value, slope = landscape.gradient(uniform)
    moved = [
        landscape.gradient([(1 - eps) * u + eps * (i == j) for i, u in enumerate(uniform)])[1].numpy() for j in range(n)
    ]
    fit = Surrogate.of(value, slope.numpy(), np.stack(moved), eps)
    subsets = {size: fit.subset(size) for size in ([k] if isinstance(k, int) else range(1, n + 1))}
    ranked = sorted((loss, len(chosen), chosen) for found in subsets.values() for loss, chosen in found)
    candidates = [tuple(mean_of(chosen, n)) for _, _, chosen in ranked]
    windows = fit.windows()
    if k == "simplex":
        best_window = range(windows[0][1], windows[0][1] + windows[0][2])
        candidates = [tuple(fit.weights().tolist()), candidates[0], tuple(mean_of(best_window, n))]
    tried: dict[tuple[float, ...], float] = {}
    for weights in candidates:
        if len(tried) < 3 and weights not in tried:
            tried[weights] = landscape.value(weights)
    if report is not None:
        report.append(
            {
                "surrogate": [[size, found[0][0]] for size, found in subsets.items()],
                "windows": [[start, length, loss] for loss, start, length in windows],
                "tried": [[list(weights), float(fit(np.array(weights))), loss] for weights, loss in tried.items()],
            }
        )
    return list(min(tried.items(), key=lambda item: item[1])[0])
