"""What a set function offers, and what follows from its values and gains alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.submodular.geometry import array
from modicum.submodular.partition import Partition

Matrix: TypeAlias = Tensor | NDArray[Any] | Sequence[Any]
BUDGET = 1 << 24  # numbers of one temporary tensor; longer work is cut into pieces
CACHED = 1 << 17  # on a processor, in whose cache they stay
TOLERANCE = 1e-9  # of gains below zero, relative to the largest, that count as rounding
RISE = 1e-6  # of gains that rise, relative to the values they are differences of, that count as rounding


@runtime_checkable
class Objective(Protocol):
    """What a policy asks of an objective: the number of elements, values of sets, gains of elements."""

    @property
    def n(self) -> int: ...
    def value(self, mask: Any, /) -> Any: ...
    def gains(self, mask: Any, block: Any, /) -> Any: ...


class SetFunction:
    """A monotone submodular function of subsets of 0 … n-1, for any number of sets at once.

    A function may stand for several worlds: ``worlds`` is then their number, and the first dimension of every mask and
    every result goes over them.

    Attributes:
        n: Number of elements.
        worlds: ``()``, or the number of worlds.
        dtype: In which it computes.
        device: Where it computes.
    """

    n: int
    worlds: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float64
    device: torch.device = torch.device("cpu")
    exact = False  # whether the multilinear extension has a closed form
    trusted = False  # whether its gains are known to be numbers of at least 0

    def value(self, mask: Any) -> Tensor:
        """Return the value of each set.

        Args:
            mask: Sets as booleans, (..., n).

        Returns:
            Shape (...).
        """
        raise NotImplementedError

    def gains(self, mask: Any, block: Any) -> Tensor:
        """Return what each element of ``block`` adds to each set.

        Args:
            mask: Sets as booleans, (..., n).
            block: Element numbers, (K,), or (..., K) for other elements with each set.

        Returns:
            ``value(mask with a) - value(mask without a)`` for each ``a`` of the block, (..., K).
        """
        raise NotImplementedError

    def gains_of(self, members: Tensor, block: Tensor) -> Tensor:
        """Return gains where sets are lists of elements, (..., R), filled up with ``n``."""
        mask = torch.zeros(*members.shape[:-1], self.n + 1, dtype=torch.bool, device=members.device)
        return self.gains(mask.scatter_(-1, members, True)[..., :-1], block)

    def own_gains(self, sets: Tensor, partition: Partition, *, disjoint: bool = False) -> Tensor:  # noqa: ARG002
        """Return what each agent's own actions add to a set of its own.

        Args:
            sets: A set for each agent, as booleans (..., agents, n), or as a list of elements that is filled up with
                ``n``, (..., agents, R).
            partition: Whose the elements are.
            disjoint: No own action is in the agent's set.

        Returns:
            Shape (..., agents, widest block).
        """
        return self.gains(sets, partition.index) if sets.dtype == torch.bool else self.gains_of(sets, partition.index)

    def last_gains(self) -> Tensor:
        """Return what each element adds to all others, (worlds, n)."""
        full = torch.ones(*self.worlds, self.n, dtype=torch.bool, device=self.device)
        return self.gains(full, torch.arange(self.n, device=self.device))

    def first_gains(self) -> Tensor:
        """Return the value of each element alone, (worlds, n)."""
        empty = torch.zeros(*self.worlds, self.n, dtype=torch.bool, device=self.device)
        return self.gains(empty, torch.arange(self.n, device=self.device))

    def curvature(self) -> Any:
        r"""Return the total curvature :math:`1 - \min_a [f(V) - f(V \setminus a)] / f(a)` over the ``a`` that count.

        Returns:
            A number in [0, 1], or a tensor of one for each world; 0 where no element has a value.

        Raises:
            RecipeError: An element lowers the value, or adds more to all others than it is worth alone: the function is
                not monotone and submodular, and has no curvature.
        """
        alone, last = self.first_gains(), self.last_gains()
        if not self.trusted:
            full, every = self._mask(torch.ones(*self.worlds, self.n)), torch.arange(self.n, device=self.device)
            refuse_falling(alone, ~full, every)
            refuse_falling(last, full, every)
            refuse_rising(last, alone, full, every, value=float(alone.amax()), fewer="alone")
        share = torch.where(alone > 0, last / torch.where(alone > 0, alone, 1), 1)
        found = (1 - share.amin(-1)).clamp(0, 1)
        return found if self.worlds else float(found)

    def multilinear(self, x: Any) -> Tensor:  # noqa: ARG002
        """Return the multilinear extension, the expected value where elements are taken independently.

        Args:
            x: Probabilities, (..., n).
        """
        raise no_closed_form(self, "multilinear extension")

    def multilinear_grad(self, x: Any) -> Tensor:  # noqa: ARG002
        """Return the gradient of the multilinear extension, of the shape of ``x``."""
        raise no_closed_form(self, "multilinear extension")

    def policy_gains(self, x: Tensor, partition: Partition, z: Tensor) -> Tensor:  # noqa: ARG002
        """Return expected gains of each agent's own actions over what the others draw.

        Args:
            x: A row of block-wise probabilities for each agent, (..., agents, n).
            partition: Whose the elements are.
            z: The probability with which another agent is present, one for each node.

        Returns:
            Shape (nodes, ..., agents, widest block).
        """
        raise no_closed_form(self, "policy extension")

    def start(self) -> Growing:
        """Return an empty set that grows, for greedy algorithms."""
        return Growing(self)

    # -- helpers for subclasses ----------------------------------------------------------------------------------

    def _mask(self, mask: Any) -> Tensor:
        found = array(mask, "mask")
        if found.dtype is not torch.bool:
            found = found != 0
        return self._shaped(found, "mask").to(self.device)

    def _point(self, x: Any) -> Tensor:
        found = self._shaped(array(x, "x").to(self.device, torch.float64), "x")
        if not bool(((found >= 0) & (found <= 1 + TOLERANCE)).all()):
            raise RecipeError("x holds a number outside [0, 1], expected probabilities.")
        return found

    def _shaped(self, found: Tensor, name: str) -> Tensor:
        if not found.ndim or found.shape[-1] != self.n:
            raise RecipeError(f"{name} has shape {tuple(found.shape)}, expected (…, {self.n}) for {self.n} elements.")
        if self.worlds and found.shape[:1] != self.worlds:
            raise RecipeError(
                f"{name} has shape {tuple(found.shape)}, expected ({self.worlds[0]}, …) as first for the worlds."
            )
        return found

    def _block(self, block: Any, batch: tuple[int, ...]) -> Tensor:
        found = array(block, "block").to(self.device)
        if not isinstance(block, Tensor) and bool(((found < 0) | (found >= self.n)).any()):
            raise RecipeError(f"block is {found.tolist()}, expected elements from 0 to {self.n - 1}.")
        return found.long().expand(*batch, found.shape[-1])

    @property
    def _count(self) -> int:
        return self.worlds[0] if self.worlds else 1


class Growing:
    """A set that grows by one element at a time, one for each world.

    Args:
        f: The function.
    """

    def __init__(self, f: Objective) -> None:
        self.f = f
        worlds = getattr(f, "worlds", ())
        self.mask = torch.zeros(*worlds, f.n, dtype=torch.bool, device=getattr(f, "device", "cpu"))

    def gains(self, block: Tensor) -> Tensor:
        """Return what each element of a block adds, (worlds, K).

        Raises:
            RecipeError: A gain is negative or no number.
        """
        found = torch.as_tensor(self.f.gains(self.mask, block))
        if not trusted(self.f):
            refuse_falling(found, self.mask, block)
        return found

    def add(self, element: Tensor) -> None:
        """Take one element in, in each world."""
        self.mask.scatter_(-1, element[..., None], True)


def trusted(f: Objective) -> bool:
    """Return whether values and gains are known to be right, so that nothing needs to be checked."""
    return isinstance(f, SetFunction) and f.trusted


def values_of(f: Objective, masks: Tensor) -> Tensor:
    """Return the value of each set in float64; an objective that is no :class:`SetFunction` gets one set at a time.

    Args:
        f: The objective.
        masks: Sets as booleans, (..., n).

    Returns:
        Shape (...).

    Raises:
        RecipeError: A value is not finite, or there are other values than sets.

    Example:
        >>> from modicum.submodular.functions import from_callable
        >>> values_of(from_callable(lambda mask: 2 * mask.sum(), 3), torch.eye(3) > 0).tolist()
        [2.0, 2.0, 2.0]
    """
    if isinstance(f, SetFunction):
        found = torch.as_tensor(f.value(masks)).double()
    else:
        rows = [float(f.value(row)) for row in masks.reshape(-1, masks.shape[-1])]
        found = torch.tensor(rows, dtype=torch.float64).reshape(masks.shape[:-1])
    if trusted(f):
        return found
    if found.shape != masks.shape[:-1]:
        raise RecipeError(f"f gave values of shape {tuple(found.shape)}, expected {tuple(masks.shape[:-1])} for sets.")
    if not bool(found.isfinite().all()):
        place = tuple(int(i) for i in (~found.isfinite()).nonzero()[0])
        raise RecipeError(f"f of {members_of(masks[place])} is {float(found[place]):g}, expected a finite number.")
    return found


def check_empty(f: Objective) -> None:
    """Refuse an objective whose empty set has a value.

    Raises:
        RecipeError: It has one.
    """
    if trusted(f):
        return
    worlds, device = getattr(f, "worlds", ()), getattr(f, "device", "cpu")
    empty = values_of(f, torch.zeros(*worlds, f.n, dtype=torch.bool, device=device))
    worst = float(empty.flatten()[empty.abs().argmax()])
    if abs(worst) > TOLERANCE:
        raise RecipeError(f"f of the empty set is {worst:g}, expected 0. Take its value away.")


def refuse_falling(gains: Tensor, mask: Tensor, block: Tensor) -> None:
    """Refuse gains below 0, beyond rounding, and gains that are no numbers.

    Args:
        gains: What elements add, (..., K).
        mask: To which sets, (..., n).
        block: The elements, (K,) or (..., K).

    Raises:
        RecipeError: There is one; it names the element and the set.
    """
    bad = ~(gains >= -TOLERANCE * (1 + gains.abs()))
    if bool(bad.any()):
        element, where, place = _first(bad, mask, block)
        raise RecipeError(
            f"the objective is not monotone: element {element} adds {float(gains[place]):g} to {where}. "
            "Policies need gains of at least 0."
        )


def refuse_rising(
    gains: Tensor, before: Tensor, mask: Tensor, block: Tensor, *, value: float, fewer: str = "to some of them"
) -> None:
    """Refuse gains that are larger, beyond rounding, than they were to a smaller set.

    Args:
        gains: What elements add, (..., K).
        before: What they added to the smaller set.
        mask: To which sets they add ``gains``, (..., n).
        block: The elements, (K,) or (..., K).
        value: Of what size the values are that gains are differences of.
        fewer: How the smaller set is named.

    Raises:
        RecipeError: There is one; it names the element and the set.
    """
    rises = gains > before + RISE * (value + before.abs())
    if bool(rises.any()):
        element, where, place = _first(rises, mask, block)
        raise RecipeError(
            f"the objective is not submodular: element {element} adds {float(gains[place]):g} to {where}, but "
            f"{float(before[place]):g} {fewer}."
        )


def _first(bad: Tensor, mask: Tensor, block: Tensor) -> tuple[int, str, tuple[int, ...]]:
    """Return the first element with a bad gain, the set without it, and where the gain stands."""
    place = tuple(int(i) for i in bad.nonzero()[0])
    element = int(block.expand(*mask.shape[:-1], block.shape[-1])[place])
    rest = mask[place[:-1]].clone()
    rest[element] = False
    return element, members_of(rest), place


def members_of(mask: Tensor, most: int = 12) -> str:
    """Write a set down.

    Example:
        >>> members_of(torch.tensor([True, False, True]))
        '{0, 2}'
    """
    elements = mask.nonzero().flatten().tolist()
    shown = [str(element) for element in elements[:most]] + (["…"] if len(elements) > most else [])
    return "{" + ", ".join(shown) + "}"


def no_closed_form(f: object, what: str) -> UnsupportedError:
    """Return the error that an exact result was asked for where none exists."""
    return UnsupportedError(
        f"{type(f).__name__} has no closed form of its {what}; FacilityLocation, ProbabilisticCoverage, WeightedCover "
        f"and mixtures of them have. {getattr(f, 'instead', '')}Take gradient='sample'."
    )


def matrix(values: Matrix, name: str, *, most: float | None = None) -> Tensor:
    """Return a matrix of numbers ≥ 0 as a tensor: float32 stays, everything else becomes float64.

    Raises:
        RecipeError: It has other than two dimensions (three for several worlds), no row or column, or a number that is
            negative, not finite, or above ``most``.
    """
    found = array(values, name).detach()
    found = found if found.dtype == torch.float32 else found.double()
    if found.ndim not in (2, 3) or 0 in found.shape:
        raise RecipeError(f"{name} has shape {tuple(found.shape)}, expected (rows, elements), neither of them 0.")
    top = most if most is not None else torch.finfo(found.dtype).max
    low, high = torch.aminmax(found)
    if not (float(low) >= 0 and float(high) <= top):  # false for NaN too, which the extremes keep
        good = (found >= 0) & (found <= top)
        place = tuple(int(i) for i in (~good).nonzero()[0])
        expected = "finite numbers of at least 0" if most is None else f"numbers in [0, {most:g}]"
        raise RecipeError(f"{name}{list(place)} is {float(found[place]):g}, expected {expected}.")
    return found


def row_weights(weights: Matrix | None, like: Tensor) -> Tensor:
    """Return a weight ≥ 0 for each row of ``like``, 1 where none are given.

    Raises:
        RecipeError: There are more or fewer than rows, or one is negative or not finite.
    """
    if weights is None:
        return torch.ones(like.shape[-2], dtype=like.dtype, device=like.device)
    found = array(weights, "weights").detach().to(like)
    if found.shape not in ((like.shape[-2],), like.shape[:-1]):
        raise RecipeError(f"weights have shape {tuple(found.shape)}, expected ({like.shape[-2]},), one for each row.")
    if not bool((found >= 0).all() and found.isfinite().all()):
        raise RecipeError("weights hold a number that is negative or not finite, expected numbers of at least 0.")
    return found


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    """Sum the last dimension of ``values (worlds, …, m)`` with weights ``(m,)``, or ``(worlds, m)``."""
    if weights.ndim == 1:
        return values @ weights
    return torch.einsum("w...m,wm->w...", values, weights)


def cached(device: torch.device) -> int:
    """Return how many numbers of a temporary tensor are best made at a time."""
    return CACHED if device.type == "cpu" else BUDGET


def pieces(rows: int, each: int, budget: int = BUDGET) -> list[slice]:
    """Cut ``rows`` into slices whose temporaries of ``each`` numbers a row stay within the budget."""
    step = max(1, budget // max(1, each))
    return [slice(start, min(rows, start + step)) for start in range(0, rows, step)]
