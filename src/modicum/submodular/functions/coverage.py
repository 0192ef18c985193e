r"""Coverage: each element covers each row with a probability of its own, or it covers it or not."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.submodular.functions.base import Matrix, SetFunction, matrix, pieces, row_weights, weighted
from modicum.submodular.partition import Partition


class ProbabilisticCoverage(SetFunction):
    r"""Cover every row, each element with a probability.

    .. math::
        f(A) = \sum_j w_j \Bigl(1 - \prod_{a \in A} (1 - p_{ja})\Bigr), \qquad
        F(x) = \sum_j w_j \Bigl(1 - \prod_a (1 - x_a p_{ja})\Bigr)

    Args:
        P: Probabilities, (rows, elements); a third dimension before them goes over worlds.
        weights: A weight ≥ 0 for each row; 1 where not given.

    Raises:
        RecipeError: A number is outside [0, 1] or not finite, or shapes do not fit.

    Example:
        >>> f = ProbabilisticCoverage([[0.5, 0.2, 0.0], [0.0, 0.4, 1.0]], weights=[1, 2])
        >>> round(float(f.value([True, True, False])), 12), round(f.curvature(), 12)
        (1.4, 0.9)

    Cost:
        A value: rows × elements, as one product of matrices.

    Reference:
        Karimi et al., "Stochastic Submodular Maximization: The Case of Coverage Functions", NeurIPS 2017, section 4.
    """

    exact = True
    trusted = True

    def __init__(self, P: Matrix, *, weights: Matrix | None = None) -> None:
        self.P = matrix(P, "P", most=1)
        self.weights = row_weights(weights, self.P)
        self.worlds, self.n = tuple(self.P.shape[:-2]), self.P.shape[-1]
        self.dtype, self.device = self.P.dtype, self.P.device
        # A certain cover is counted, not multiplied: the logarithm of 0 is no number to add and take away again.
        self._certain = (self.P == 1).to(self.P)
        self._log = torch.log1p(-self.P.where(self.P < 1, 0))

    def value(self, mask: Any) -> Tensor:
        """Return the value of each set (see :meth:`SetFunction.value`)."""
        found = self._mask(mask)
        log, certain = self._sums(self._rows(found))
        missed = torch.where(certain > 0.5, 0, log.exp())
        return self._out(1 - missed, found.shape[:-1])

    def gains(self, mask: Any, block: Any) -> Tensor:
        """Return what each element adds to each set (see :meth:`SetFunction.gains`)."""
        found = self._mask(mask)
        batch = tuple(found.shape[:-1])
        rows, block = self._rows(found), self._block(block, batch)
        log, certain = self._sums(rows)
        out = []
        places = block.reshape(self._count, -1, block.shape[-1])
        for part in pieces(rows.shape[1], block.shape[-1] * self.P.shape[-2] * self._count):
            some = places[:, part]
            inside = rows[:, part].gather(-1, some)[..., None]
            p, own, sure = (self._columns(table, some) for table in (self.P, self._log, self._certain))
            rest = log[:, part, None] - inside * own
            free = certain[:, part, None] - inside * sure < 0.5
            missed = torch.where(free, rest.exp(), 0)
            out.append(weighted(missed.mul_(p), self._weights))
        return torch.cat(out, 1).reshape(*batch, -1)

    def multilinear(self, x: Any) -> Tensor:
        """Return the extension of each point (see :meth:`SetFunction.multilinear`)."""
        point = self._point(x)
        points, P = point.reshape(self._count, -1, self.n), self._table.double()
        missed = [(1 - points[:, part, None] * P[:, None]).prod(-1) for part in pieces(points.shape[1], P.numel())]
        return weighted(1 - torch.cat(missed, 1), self._weights.double()).reshape(point.shape[:-1])

    def multilinear_grad(self, x: Any) -> Tensor:
        """Return the gradient of the extension of each point (see :meth:`SetFunction.multilinear_grad`)."""
        point = self._point(x)
        points, P = point.reshape(self._count, -1, self.n), self._table.double()
        w = self._weights.double().expand(self._count, -1)[:, None, :, None]
        out = []
        for part in pieces(points.shape[1], 4 * P.numel()):
            missed = 1 - points[:, part, None] * P[:, None]
            pad = torch.nn.functional.pad
            before = pad(missed[..., :-1], (1, 0), value=1).cumprod(-1)
            after = pad(missed[..., 1:], (0, 1), value=1).flip(-1).cumprod(-1).flip(-1)
            out.append((before * after * P[:, None] * w).sum(-2))
        return torch.cat(out, 1).reshape(point.shape)

    def policy_gains(self, x: Tensor, partition: Partition, z: Tensor) -> Tensor:
        """Return expected gains over what the others draw (see :meth:`SetFunction.policy_gains`)."""
        from modicum.submodular.functions.policy_extension import coverage_gains

        return coverage_gains(self.P.double(), self.weights.double(), x, partition, z)

    @property
    def _table(self) -> Tensor:
        return self.P if self.worlds else self.P[None]

    @property
    def _weights(self) -> Tensor:
        return self.weights if self.worlds or self.weights.ndim == 2 else self.weights[None].expand(1, -1)

    def _rows(self, mask: Tensor) -> Tensor:
        return mask.reshape(self._count, -1, self.n).to(self.dtype)

    def _sums(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return for each set and row the log of being missed by chance, and how many cover it for certain."""
        return rows @ self._log.mT, rows @ self._certain.mT

    def _columns(self, table: Tensor, elements: Tensor) -> Tensor:
        table = (table if self.worlds else table[None]).mT
        world = torch.arange(self._count, device=self.device)[:, None, None]
        return table[world, elements]

    def _out(self, covered: Tensor, shape: Sequence[int]) -> Tensor:
        return weighted(covered, self._weights).reshape(tuple(shape))


class WeightedCover(ProbabilisticCoverage):
    r"""Cover items: what counts is the weight of the union.

    .. math::
        f(A) = \sum_j w_j [\text{some } a \in A \text{ covers } j]

    Args:
        covers: For each element the items that it covers, as sets or lists, or a matrix of 0 and 1, (items, elements).
        weights: A weight ≥ 0 for each item; 1 where not given.

    Raises:
        RecipeError: An item is no number ≥ 0, shapes do not fit, or lists read both as items and as a matrix.

    Example:
        >>> float(WeightedCover([{0, 1}, {1, 2}]).value([True, True]))
        3.0

    Cost:
        As for probabilistic coverage.

    Reference:
        Nemhauser, Wolsey and Fisher, "An Analysis of Approximations for Maximizing Submodular Set Functions", 1978.
    """

    def __init__(self, covers: Matrix | Sequence[Collection[int]], *, weights: Matrix | None = None) -> None:
        if _lists_items(covers):
            most = max((max(row, default=-1) for row in covers), default=-1)
            count = max(most + 1, len(weights) if weights is not None else 0)
            table = torch.zeros(count, len(covers), dtype=torch.float64)
            for element, items in enumerate(covers):
                if any(item < 0 for item in items):
                    raise RecipeError(f"element {element} covers item {min(items)}, expected numbers of at least 0.")
                table[list(items), element] = 1
            covers = table
        super().__init__(covers, weights=weights)
        if not bool(((self.P == 0) | (self.P == 1)).all()):
            raise RecipeError("covers hold a number other than 0 and 1. For probabilities take ProbabilisticCoverage.")


def _lists_items(covers: Any) -> bool:
    """Return whether the rows of ``covers`` are items of an element, not rows of a matrix.

    Raises:
        RecipeError: They read both ways.
    """
    if not isinstance(covers, (list, tuple)) or not all(isinstance(row, Collection) for row in covers):
        return False
    if any(isinstance(row, (set, frozenset)) for row in covers):
        return True
    rows = [list(row) for row in covers]
    items = all(type(item) is int for row in rows for item in row) and all(len(set(row)) == len(row) for row in rows)
    table = len({len(row) for row in rows}) == 1 and all(item in (0, 1) for row in rows for item in row)
    if items and table:
        raise RecipeError(
            f"covers starts with {rows[0]}, which reads as items of an element and as a row of a matrix. Give sets of "
            "items, or a matrix as an array or tensor."
        )
    return items
