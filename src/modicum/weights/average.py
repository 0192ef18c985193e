"""Averaging the checkpoints of one run: a rule gives each a coefficient, one streamed pass makes the mean.

An averager is a function from the checkpoints, oldest first, to coefficients that sum to 1. A rule looks only at how
many there are; one that learns (fact ``learns``) is given a loss of coefficients as its first argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from modicum.errors import RecipeError
from modicum.random import generator
from modicum.registry import averager
from modicum.types import Decay, PositiveInt
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.merge import open_checkpoint, run_plan
from modicum.weights.plan import Plan, plan_merge

Loss = Callable[[Sequence[float]], float]
SHAPES: Mapping[str, Callable[[float], float]] = {  # of a decay from 1 to 0
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - math.sqrt(t),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


def average(
    checkpoints: Sequence[str | Path | Checkpoint],
    out: str | Path,
    *,
    method: str = "uniform",
    dtype: str | torch.dtype | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    progress: bool = True,
    **knobs: Any,
) -> list[float]:
    """Average checkpoints on disk into one model.

    Args:
        checkpoints: Folders or opened checkpoints, oldest first.
        out: Folder to write; it must not hold anything yet.
        method: Name of an averager; see ``modicum list averagers``.
        dtype: Of the result; that of the checkpoints when not given.
        loss: For averagers that learn: from coefficients to a held-out loss.
        seed: For averagers that draw random numbers.
        progress: Show a bar when standard error is a terminal.
        **knobs: The averager's.

    Returns:
        The coefficient of each checkpoint.

    Raises:
        ModicumError: The checkpoints do not fit together, a knob is wrong, or the result cannot be written.
    """
    opened = [open_checkpoint(checkpoint) for checkpoint in checkpoints]
    coefficients = choose_coefficients(opened, method=method, loss=loss, seed=seed, **knobs)
    run_plan(plan_average(opened, coefficients, dtype=dtype), Path(out), progress=progress)
    return coefficients


def choose_coefficients(
    checkpoints: Sequence[Checkpoint], *, method: str, loss: Loss | None = None, seed: int = 0, **knobs: Any
) -> list[float]:
    """Ask the averager called ``method`` for the coefficients.

    Raises:
        RecipeError: There is no checkpoint, a knob is wrong, or the averager learns and no loss is given.
    """
    if not checkpoints:
        raise RecipeError("There are no checkpoints to average. List at least one.")
    entry = averager[method]
    checked = entry.knobs(knobs)
    if not entry.facts.learns:
        return list(entry.function(checkpoints, **checked))
    if loss is None:
        raise RecipeError(f"{method} learns its coefficients from a loss, and none is given. Give held-out data.")
    return list(entry.function(loss, checkpoints, **checked, rng=generator(seed, method)))


def plan_average(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], *, dtype: str | torch.dtype | None = None
) -> Plan:
    """Return the plan of a weighted average; checkpoints of coefficient zero are not read."""
    used = [(c, w) for c, w in zip(checkpoints, coefficients, strict=True) if w]
    return plan_merge(None, [c for c, _ in used], method="linear", knobs={"weights": [w for _, w in used]}, dtype=dtype)


@averager("uniform", paper="arXiv:1803.05407")
def uniform(checkpoints: Sequence[object]) -> list[float]:
    r"""Average all checkpoints equally.

    .. math::
        c_i = 1 / n

    Args:
        checkpoints: Oldest first.

    Returns:
        The coefficients.

    Example:
        >>> uniform(["a", "b"])
        [0.5, 0.5]

    Cost:
        One pass over the checkpoints.

    Deviates:
        None known.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
        arXiv:1803.05407, Algorithm 1.
    """
    return [1 / len(checkpoints)] * len(checkpoints)


@averager("lawa", paper="arXiv:2209.14981")
def lawa(checkpoints: Sequence[object], *, last: PositiveInt = 5) -> list[float]:
    r"""Average the latest checkpoints equally.

    .. math::
        c_i = \frac{1}{k}\,[i > n - k]

    Args:
        checkpoints: Oldest first.
        last: How many of the latest (k).

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``last``.

    Example:
        >>> lawa(["a", "b", "c", "d"], last=2)
        [0.0, 0.0, 0.5, 0.5]

    Cost:
        One pass over ``last`` checkpoints.

    Deviates:
        None known. How far apart the checkpoints lie is decided when they are saved.

    Reference:
        Kaddour, "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging", 2022,
        arXiv:2209.14981, Section 2.
    """
    n = len(checkpoints)
    if last > n:
        raise RecipeError(f"lawa: last is {last}, but there are {n} checkpoints. Lower it, or save more often.")
    return [0.0] * (n - last) + [1 / last] * last


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
        None known: this is the moving average that starts at the first checkpoint and is updated with each further one.

    Reference:
        Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
        Optimization 30(4), 1992, for averaging; the exponential form is folklore.
    """
    n = len(checkpoints)
    return [decay ** (n - 1)] + [(1 - decay) * decay ** (n - i) for i in range(2, n + 1)]


@averager("wsm", paper="arXiv:2507.17634")
def wsm(checkpoints: Sequence[object], *, decay: Literal["linear", "sqrt", "cosine"] = "sqrt") -> list[float]:
    r"""Average constant-rate checkpoints as if the learning rate had decayed over them.

    .. math::
        c_1 = 1 - w_1, \quad c_j = w_{j-1} - w_j, \quad c_n = w_{n-1}

    where :math:`w_1 \ge \dots \ge w_{n-1}` is the decay of the learning rate over the steps between the checkpoints.

    Args:
        checkpoints: Oldest first, of a run at constant learning rate.
        decay: Shape of the imitated decay from 1 to 0 at :math:`t = j / n`: ``linear`` is :math:`1 - t` and gives the
            uniform mean, ``sqrt`` :math:`1 - \sqrt{t}`, ``cosine`` :math:`(1 + \cos \pi t) / 2`.

    Returns:
        The coefficients.

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
    w = [1.0, *(SHAPES[decay](j / n) for j in range(1, n)), 0.0]
    return [before - after for before, after in pairwise(w)]


@averager("last")
def last(checkpoints: Sequence[object]) -> list[float]:
    r"""Take the last checkpoint as it is: the baseline.

    .. math::
        c_n = 1

    Args:
        checkpoints: Oldest first.

    Returns:
        The coefficients.

    Example:
        >>> last(["a", "b"])
        [0.0, 1.0]

    Cost:
        One copy.

    Deviates:
        None known.

    Reference:
        None: the baseline of every other averager.
    """
    return [0.0] * (len(checkpoints) - 1) + [1.0]
