"""The greedy soup over the checkpoints of one run: good alone first, then whatever helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from modicum.registry import averager
from modicum.types import PositiveInt
from modicum.weights.averagers.support import check_k, mean_of
from modicum.weights.search import Landscape


def work(n: int, batches: int, *, most: int | None = None) -> tuple[int, int, int]:
    """Return the passes with gradient, and the least and most without."""
    return 0, (n + min(most or n, n) - 1) * batches, (n if most == 1 else 2 * n - 1) * batches


@averager("greedy", learns="value", paper="arXiv:2203.05482", supplied={"report"}, work=work)
def greedy(
    landscape: Landscape,
    checkpoints: Sequence[object],
    *,
    most: PositiveInt | None = None,
    report: list[dict[str, Any]] | None = None,
) -> list[float]:
    r"""Go through the checkpoints from the best alone, and keep each that does not make the mean worse.

    .. math::
        S \leftarrow S \cup \{i\} \text{ if } F(\bar\theta_{S \cup \{i\}}) \le F(\bar\theta_S)

    Args:
        landscape: The loss along the checkpoints.
        checkpoints: Oldest first; of equally good ones the newest comes first.
        most: Stop at so many.
        report: Gets what each attempt did.

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``most``.

    Example:
        >>> import torch
        >>> known = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 2.0, 10.0)]
        >>> greedy(Landscape(lambda weights, t: (weights["w"] - t).square().sum(), known, [1.5]), known)
        [0.0, 0.5, 0.5, 0.0]

    Cost:
        At most 2n - 1 forward passes for each batch.

    Deviates:
        The paper's soup is of models of several runs, by held-out accuracy; this one is of checkpoints of one run, by
        the loss.

    Reference:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", ICML 2022, arXiv:2203.05482, Recipe 1.
    """
    n = len(checkpoints)
    if most is not None:
        check_k("greedy", most, n, knob="most")
    alone = [landscape.value(mean_of([i], n)) for i in range(n)]
    first, *others = sorted(range(n), key=lambda i: (alone[i], -i))
    chosen, loss = [first], alone[first]
    told = [{"checkpoint": first, "loss": loss, "kept": True}]
    for i in others:
        if len(chosen) == most:
            break
        tried = landscape.value(mean_of([*chosen, i], n))
        told.append({"checkpoint": i, "loss": tried, "kept": tried <= loss})
        if tried <= loss:
            chosen, loss = [*chosen, i], tried
    if report is not None:
        report.append({"greedy": told})
    return mean_of(chosen, n)
