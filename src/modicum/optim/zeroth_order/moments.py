r"""How an estimated gradient becomes a step: pure functions on coordinates, or on chunks of a dense tensor.

The estimate is :math:`g = \kappa\, c`: a scalar times the coordinates that were drawn. Each update returns the vector
to step against and the new state; the same function serves a TeZO run's few thousand coordinates and a dense tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from torch import Tensor

State: TypeAlias = tuple[Tensor, ...]
Betas: TypeAlias = tuple[float, float]
Update: TypeAlias = Callable[[Tensor, State, "Knobs"], tuple[Tensor, State]]


class Knobs(NamedTuple):
    """Memories of the moving averages, the floor of a root, and the steps averaged with this one (0: uncorrected)."""

    betas: Betas
    eps: float
    age: int


def sgd(gradient: Tensor, state: State, _knobs: Knobs) -> tuple[Tensor, State]:
    """Step along the estimate itself."""
    return gradient, state


def momentum(gradient: Tensor, state: State, knobs: Knobs) -> tuple[Tensor, State]:
    r"""Step along :math:`m \leftarrow \beta_1 m + (1-\beta_1) g`."""
    mean = state[0].lerp(gradient, 1 - knobs.betas[0])
    return mean, (mean,)


def adam(gradient: Tensor, state: State, knobs: Knobs) -> tuple[Tensor, State]:
    r"""Step along :math:`\hat m / (\sqrt{\hat v} + \epsilon)`; corrected for their start at zero."""
    mean, square = moments(gradient, state, betas=knobs.betas)
    first, second = corrections(knobs.betas, knobs.age)
    return (mean / first) / ((square / second).sqrt() + knobs.eps), (mean, square)


def lion(gradient: Tensor, state: State, knobs: Knobs) -> tuple[Tensor, State]:
    r"""Step along :math:`\operatorname{sign}(\beta_1 m + (1-\beta_1) g)`, then move :math:`m` with :math:`\beta_2`."""
    mixed, mean = lion_moments(gradient, state, betas=knobs.betas)
    return mixed.sign(), (mean,)


def moments(gradient: Tensor, state: State, *, betas: Betas) -> State:
    """Return the moving averages of the estimate and of its square."""
    mean, square = state
    return mean.lerp(gradient, 1 - betas[0]), square.lerp(gradient * gradient, 1 - betas[1])


def lion_moments(gradient: Tensor, state: State, *, betas: Betas) -> State:
    """Return Lion's interpolation, whose sign is the step, and its new moving average."""
    (mean,) = state
    return mean.lerp(gradient, 1 - betas[0]), mean.lerp(gradient, 1 - betas[1])


def corrections(betas: Betas, age: int) -> tuple[float, float]:
    """Return the divisors of the two moving averages; one each when ``age`` is 0.

    Example:
        >>> corrections((0.9, 0.99), 0)
        (1.0, 1.0)
    """
    return (1 - betas[0] ** age, 1 - betas[1] ** age) if age else (1.0, 1.0)


UPDATES: Mapping[str, tuple[Update, int]] = MappingProxyType(  # the update, and how many vectors it remembers
    {"sgd": (sgd, 0), "momentum": (momentum, 1), "adam": (adam, 2), "lion": (lion, 1)}
)


def entry_adam(left: Tensor, right: Tensor, mean: Tensor, square: Tensor, *, eps: float) -> Tensor:
    r"""Return TeZO-Adam's step on some rows: :math:`M / \sqrt{V + \epsilon}`, entry by entry.

    Args:
        left: Rows of :math:`U`, (m, r).
        right: :math:`V`, (n, r).
        mean: First moment of the coordinates, (1, r).
        square: Second moment of the coordinates, (1, r).
        eps: Added inside the root.

    Returns:
        :math:`U\,diag(mean)\,V^\top / \sqrt{U^{\odot 2} diag(square)\,(V^{\odot 2})^\top + \epsilon}`.
    """
    variance = ((left * left) * square) @ (right * right).mT
    return ((left * mean) @ right.mT).mul_(variance.add_(eps).rsqrt_())


def entry_lion(left: Tensor, right: Tensor, mixed: Tensor) -> Tensor:
    """Return the sign of the lifted interpolation, entry by entry."""
    return ((left * mixed) @ right.mT).sign_()


def entry_adam_update(gradient: Tensor, state: State, knobs: Knobs) -> tuple[Callable[..., Tensor], State, State]:
    """Return TeZO-Adam's step, the coordinates that it lifts, and the new state."""
    mean, square = moments(gradient, state, betas=knobs.betas)
    first, second = corrections(knobs.betas, knobs.age)
    return partial(entry_adam, eps=knobs.eps), (mean / first, square / second), (mean, square)


def entry_lion_update(gradient: Tensor, state: State, knobs: Knobs) -> tuple[Callable[..., Tensor], State, State]:
    """Return TeZO-Lion's step, the coordinates that it lifts, and the new state."""
    mixed, mean = lion_moments(gradient, state, betas=knobs.betas)
    return entry_lion, (mixed,), (mean,)


ENTRYWISE = MappingProxyType({"adam": entry_adam_update, "lion": entry_lion_update})


def spsa_coefficient(plus: Tensor, minus: Tensor, *, eps: float) -> Tensor:
    r"""Return :math:`\kappa = (\ell_+ - \ell_-) / (2\rho)`, on the losses' device.

    Example:
        >>> import torch
        >>> spsa_coefficient(torch.tensor(3.0), torch.tensor(1.0), eps=0.5)
        tensor(2.)
    """
    return (plus - minus) / (2 * eps)
