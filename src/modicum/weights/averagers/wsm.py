"""A decay of the learning rate, imitated by weights on the checkpoints of a run at constant rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

from modicum.errors import RecipeError
from modicum.registry import averager

SHAPES: Mapping[str, Callable[[float], float]] = MappingProxyType(  # of a decay from 1 to 0
    {
        "linear": lambda t: 1 - t,
        "sqrt": lambda t: 1 - math.sqrt(t),
        "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    }
)


@averager("wsm", paper="arXiv:2507.17634")
def wsm(
    checkpoints: Sequence[object], *, decay: Literal["linear", "sqrt", "cosine"] | list[float] = "sqrt"
) -> list[float]:
    r"""Average constant-rate checkpoints as if the learning rate had decayed over them.

    .. math::
        c_1 = 1 - w_1, \quad c_j = w_{j-1} - w_j, \quad c_n = w_{n-1}

    where :math:`w_1 \ge \dots \ge w_{n-1}` is the decay of the learning rate over the steps between the checkpoints.

    Args:
        checkpoints: Oldest first, of a run at constant learning rate.
        decay: Shape of the imitated decay from 1 to 0 at :math:`t = j / n`: ``linear`` is :math:`1 - t` and gives the
            uniform mean, ``sqrt`` :math:`1 - \sqrt{t}`, ``cosine`` :math:`(1 + \cos \pi t) / 2`; or a list of the
            n - 1 values themselves, none above 1, below 0 or above the one before.

    Returns:
        The coefficients.

    Raises:
        RecipeError: A list has another length, rises, or leaves [0, 1].

    Example:
        >>> [round(c, 3) for c in wsm(["a", "b", "c", "d"], decay="linear")]
        [0.25, 0.25, 0.25, 0.25]

    Cost:
        One pass over the checkpoints.

    Deviates:
        The window is what is given; the paper's finding is that its length matters most.

    Reference:
        Tian et al., "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM Pre-training", 2025,
        arXiv:2507.17634, Theorem 3.1.
    """
    n = len(checkpoints)
    values = [SHAPES[decay](j / n) for j in range(1, n)] if isinstance(decay, str) else decay
    if len(values) != n - 1:
        raise RecipeError(
            f"wsm: decay has {len(values)} values for {n} checkpoints, expected {n - 1}: one for each step. "
            "A trainer's save_total_limit deletes all but the latest checkpoints."
        )
    w = [1.0, *values, 0.0]
    if any(not after <= before for before, after in pairwise(w)):
        raise RecipeError(f"wsm: decay is {list(values)}, expected numbers from 1 to 0 that never rise.")
    return [before - after for before, after in pairwise(w)]
