"""The mean of checkpoints drawn at random: the control of every choice that claims to be better than chance."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from modicum.registry import averager
from modicum.types import PositiveInt
from modicum.weights.averagers.support import check_k, mean_of, some_of


@averager("random")
def random(checkpoints: Sequence[object], *, k: PositiveInt | None = None, rng: torch.Generator) -> list[float]:
    r"""Average some checkpoints drawn without replacement: the control.

    .. math::
        c_i = \frac{1}{k}\,[i \in S], \qquad S \text{ uniform among the sets of size } k

    Args:
        checkpoints: Oldest first.
        k: How many; when not given, as many as ``sewa`` searches with: ``min(5, ceil(n / 2))``.
        rng: Of the recipe's seed: several seeds give several draws.

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``k``.

    Example:
        >>> sorted(random(["a", "b", "c"], k=2, rng=torch.Generator().manual_seed(0)))
        [0.0, 0.5, 0.5]

    Cost:
        One pass over ``k`` checkpoints.

    Reference:
        None: a control.
    """
    n = len(checkpoints)
    k = some_of(n) if k is None else k
    check_k("random", k, n)
    return mean_of(torch.randperm(n, generator=rng)[:k].tolist(), n)
