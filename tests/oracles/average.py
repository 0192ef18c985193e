"""Averaging checkpoints in NumPy float64: each rule as what it does, step by step, to the checkpoints themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]


def uniform(models: Sequence[Array]) -> Array:
    """Izmailov et al. 2018, Algorithm 1: the running mean."""
    mean, count = models[0], 1
    for model in models[1:]:
        mean, count = (mean * count + model) / (count + 1), count + 1
    return mean


def lawa(models: Sequence[Array], last: int) -> Array:
    """Kaddour 2022, Section 2: the mean of the latest."""
    return np.mean(np.stack(models[-last:]), 0)


def ema(models: Sequence[Array], decay: float) -> Array:
    """The average that starts at the first checkpoint and is updated with each further one."""
    moving = models[0]
    for model in models[1:]:
        moving = decay * moving + (1 - decay) * model
    return moving


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "sqrt": lambda t: 1 - t**0.5,
    "cosine": lambda t: np.cos(np.pi * t / 2) ** 2,  # half of 1 + cos(πt)
}


def wsm(models: Sequence[Array], shape: str | Sequence[float]) -> Array:
    """Tian et al. 2025, Theorem 3.1: the steps between checkpoints, each as large as a decaying rate would make it."""
    decayed = models[0]
    for j in range(1, len(models)):
        rate = DECAYS[shape](j / len(models)) if isinstance(shape, str) else shape[j - 1]
        decayed = decayed + rate * (models[j] - models[j - 1])
    return decayed


def wma(models: Sequence[Array]) -> Array:
    """Li et al. 2025: every checkpoint as often as its number says."""
    return np.mean([model for number, model in enumerate(models, 1) for _ in range(number)], 0)


def power_ema(models: Sequence[Array], sigma_rel: float) -> Array:
    """Karras et al. 2024, Equation 121 in closed form: the profile t^γ over the run, each checkpoint an n-th of it.

    γ is the root of a cubic, as their Algorithm 2 finds it.
    """
    t = sigma_rel**-2
    gamma = max(root.real for root in np.roots([1, 7, 16 - t, 12 - t]) if abs(root.imag) < 1e-9)
    edges = np.linspace(0, 1, len(models) + 1) ** (gamma + 1)
    return sum(share * model for share, model in zip(np.diff(edges), models))


def last(models: Sequence[Array]) -> Array:
    """No average."""
    return models[-1]


def slope(loss: Callable[[Array], float], models: Sequence[Array], weights: Sequence[float], h: float = 1e-6) -> Array:
    """Return the slope of a loss of the weighted mean in each coefficient, by central differences."""

    def at(c: Array) -> float:
        return loss(sum(w * model for w, model in zip(c, models)))

    c, unit = np.asarray(weights, float), np.eye(len(models))
    return np.array([(at(c + h * e) - at(c - h * e)) / (2 * h) for e in unit])
