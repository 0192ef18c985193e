"""Objectives made of others: mixtures, and any function of sets that a user has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.submodular.functions.base import TOLERANCE, SetFunction, members_of
from modicum.submodular.partition import Partition


class Mixture(SetFunction):
    r"""Add functions with weights: values, gains, extension and gradient are linear.

    .. math::
        f(A) = \sum_i \lambda_i f_i(A), \qquad \lambda_i \ge 0

    Args:
        functions: Set functions of the same elements.
        weights: A weight ≥ 0 for each; 1 where not given.

    Raises:
        RecipeError: There is none, one is no :class:`SetFunction`, they have different elements or worlds, or a weight
            is negative or not finite.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> f = FacilityLocation([[1.0, 2.0]])
        >>> float(Mixture([f, f], [1.0, 0.5]).value([True, False]))
        1.5

    Cost:
        That of its parts.

    Reference:
        Lin and Bilmes, "Learning Mixtures of Submodular Shells", UAI 2012.
    """

    def __init__(self, functions: Sequence[SetFunction], weights: Sequence[float] | None = None) -> None:
        self.functions = list(functions)
        self.weights = [1.0] * len(self.functions) if weights is None else [float(weight) for weight in weights]
        if not self.functions or len(self.weights) != len(self.functions):
            raise RecipeError(f"{len(self.functions)} functions and {len(self.weights)} weights, expected as many.")
        if any(not 0 <= weight < float("inf") for weight in self.weights):
            raise RecipeError(f"weights are {self.weights}, expected finite numbers of at least 0.")
        if strange := [type(f).__name__ for f in self.functions if not isinstance(f, SetFunction)]:
            raise RecipeError(f"a mixture of {strange[0]}: expected set functions. from_callable makes one of a value.")
        first = self.functions[0]
        if any((f.n, f.worlds) != (first.n, first.worlds) for f in self.functions):
            raise RecipeError("functions of a mixture must have the same elements and worlds.")
        self.n, self.worlds, self.dtype, self.device = first.n, first.worlds, first.dtype, first.device
        self.exact = all(f.exact for f in self.functions)
        self.trusted = all(f.trusted for f in self.functions)

    def value(self, mask: Any) -> Tensor:
        """Return the value of each set (see :meth:`SetFunction.value`)."""
        return self._sum(lambda f: f.value(mask))

    def gains(self, mask: Any, block: Any) -> Tensor:
        """Return what each element adds to each set (see :meth:`SetFunction.gains`)."""
        return self._sum(lambda f: f.gains(mask, block))

    def gains_of(self, members: Tensor, block: Tensor) -> Tensor:
        """Return gains where sets are lists of elements."""
        return self._sum(lambda f: f.gains_of(members, block))

    def multilinear(self, x: Any) -> Tensor:
        """Return the extension of each point (see :meth:`SetFunction.multilinear`)."""
        return self._sum(lambda f: f.multilinear(x))

    def multilinear_grad(self, x: Any) -> Tensor:
        """Return the gradient of the extension of each point (see :meth:`SetFunction.multilinear_grad`)."""
        return self._sum(lambda f: f.multilinear_grad(x))

    def policy_gains(self, x: Tensor, partition: Partition, z: Tensor) -> Tensor:
        """Return expected gains over what the others draw (see :meth:`SetFunction.policy_gains`)."""
        return self._sum(lambda f: f.policy_gains(x, partition, z))

    def _sum(self, part: Callable[[SetFunction], Tensor]) -> Tensor:
        return torch.stack([weight * part(f) for f, weight in zip(self.functions, self.weights)]).sum(0)


class from_callable(SetFunction):  # noqa: N801 - it reads as the function that the user calls
    """Make an objective of any function from a set to a number.

    Args:
        value: Gets a set as a boolean tensor of length ``n`` and returns a number.
        n: Number of elements.
        shift: Take the value of the empty set away, where it is not 0.

    Raises:
        RecipeError: The empty set has a value other than 0 and ``shift`` is off, or a value is not finite.

    Example:
        >>> f = from_callable(lambda mask: float(mask.sum()) ** 0.5, 4)
        >>> float(f.value([True] * 4)), f.gains([False] * 4, [0]).tolist()
        (2.0, [1.0])

    Cost:
        One call for each value, two for each gain, one after the other.
    """

    def __init__(self, value: Callable[[Tensor], Any], n: int, *, shift: bool = False) -> None:
        if n < 1:
            raise RecipeError(f"n is {n}, expected at least 1.")
        self.n, self._of, self._empty = n, value, 0.0
        empty = self._call(torch.zeros(n, dtype=torch.bool))
        if shift:
            self._empty = empty
        elif abs(empty) > TOLERANCE:
            raise RecipeError(f"f of the empty set is {empty:g}, expected 0. Give shift=True to take it away.")

    def value(self, mask: Any) -> Tensor:
        """Return the value of each set (see :meth:`SetFunction.value`)."""
        found = self._mask(mask)
        values = [self._call(row) for row in found.reshape(-1, self.n)]
        return torch.tensor(values, dtype=torch.float64).reshape(found.shape[:-1])

    def gains(self, mask: Any, block: Any) -> Tensor:
        """Return what each element adds to each set (see :meth:`SetFunction.gains`)."""
        found = self._mask(mask)
        block = self._block(block, tuple(found.shape[:-1]))
        out = []
        for row, elements in zip(found.reshape(-1, self.n), block.reshape(-1, block.shape[-1])):
            known: dict[int, float] = {}
            here = self._call(row)
            for element in elements.tolist():
                if element not in known:
                    other = row.clone()
                    other[element] = ~row[element]
                    there = self._call(other)
                    known[element] = here - there if bool(row[element]) else there - here
                out.append(known[element])
        return torch.tensor(out, dtype=torch.float64).reshape(*found.shape[:-1], -1)

    def _call(self, mask: Tensor) -> float:
        value = float(self._of(mask)) - self._empty
        if value != value or abs(value) == float("inf"):
            raise RecipeError(f"f of {members_of(mask)} is {value}, expected a finite number.")
        return value
