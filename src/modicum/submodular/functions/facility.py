r"""Facility location, :math:`f(A) = \sum_j w_j \max_{a \in A} V_{ja}`: every row is served by its best element."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.submodular.functions.base import (
    BUDGET,
    Growing,
    Matrix,
    SetFunction,
    cached,
    matrix,
    pieces,
    row_weights,
    weighted,
)
from modicum.submodular.geometry import array
from modicum.submodular.partition import Partition

TINY = 1e-30  # in place of a probability 0 of absence; it cancels in the gradient


class FacilityLocation(SetFunction):
    r"""Serve every row by its best element.

    .. math::
        f(A) = \sum_j w_j \max_{a \in A} V_{ja}, \qquad f(\emptyset) = 0

    The multilinear extension sorts each row once, in descending order, and with :math:`Q_k = \prod_{l<k} (1 - x_l)`
    is :math:`F = \sum_k V_k x_k Q_k`, with :math:`\partial F / \partial x_k = Q_k V_k - \sum_{l>k} V_l x_l Q_l /
    (1 - x_k)`.

    Args:
        V: Numbers ≥ 0, (rows, elements); a third dimension before them goes over worlds. float32 stays float32.
        weights: A weight ≥ 0 for each row; 1 where not given.
        columns: The column of ``V`` of each element, where several elements share one: the extension is then computed
            on the columns.

    Raises:
        RecipeError: A number is negative or not finite, or shapes do not fit.

    Example:
        >>> f = FacilityLocation([[3, 1, 0], [0, 2, 2]])
        >>> float(f.value([True, True, False])), f.curvature()
        (5.0, 1.0)
        >>> f.multilinear_grad([0.5, 0.25, 0.5]).tolist()
        [2.75, 1.5, 1.5]

    Cost:
        A value: rows × size of the set. The extension: rows × columns, after one sort.

    Reference:
        Cornuéjols, Fisher and Nemhauser, "Location of Bank Accounts to Optimize Float", Management Science 23(8), 1977;
        the extension is the expected maximum of independent elements.
    """

    exact = True
    trusted = True

    def __init__(self, V: Matrix, *, weights: Matrix | None = None, columns: Matrix | None = None) -> None:
        self.V = matrix(V, "V")
        self.weights = row_weights(weights, self.V)
        self.worlds = tuple(self.V.shape[:-2])
        self.dtype, self.device = self.V.dtype, self.V.device
        self._set_columns(self.V.shape[-1], columns)

    def _set_columns(self, width: int, columns: Matrix | None) -> None:
        self.width, self.columns = width, None
        if columns is not None:
            self.columns = array(columns, "columns").to(self.device).long()
            if self.columns.ndim != 1 or bool((self.columns < 0).any() or (self.columns >= width).any()):
                raise RecipeError(f"columns name a column outside 0 … {width - 1}, or are no list.")
        self.n = width if self.columns is None else len(self.columns)

    @classmethod
    def from_features(
        cls,
        X: Matrix,
        Y: Matrix | None = None,
        *,
        kernel: Literal["cosine", "dot", "rbf"] | Callable[[Tensor, Tensor], Tensor] = "cosine",
        neighbours: int | None = None,
        weights: Matrix | None = None,
    ) -> FacilityLocation:
        """Make the function of similarities between feature vectors, without ever holding all of them.

        Args:
            X: Features of the elements, (n, d).
            Y: Features of the rows to serve, (m, d); the elements themselves where not given.
            kernel: Similarity; what is below 0 counts as 0. ``rbf`` is exp(-|x-y|²/d).
            neighbours: Keep so many best elements of each row. Not given, columns are computed when they are asked
                for, and only greedy algorithms, values and gains are offered.
            weights: A weight for each row.

        Example:
            >>> f = FacilityLocation.from_features([[1.0, 0.0], [0.0, 1.0]], kernel="dot", neighbours=1)
            >>> float(f.value([True, False]))
            1.0
        """
        from modicum.submodular.functions.features import FeatureLocation, nearest

        made = FeatureLocation(X, X if Y is None else Y, kernel=kernel, weights=weights)
        return made if neighbours is None else nearest(made, neighbours)

    # -- columns, which subclasses compute in another way --------------------------------------------------------

    @cached_property
    def _table(self) -> Tensor:
        """The columns of all worlds one after the other, a row each, and one of zeros after those of each world."""
        flipped = self.V.reshape(-1, *self.V.shape[-2:]).mT
        return torch.cat([flipped, self.V.new_zeros(self._count, 1, self.rows)], 1).flatten(0, 1)

    def _lookup(self, elements: Tensor, world: Tensor | None) -> Tensor:
        """Return columns of elements, (..., m); element ``n`` has zeros."""
        if self.columns is not None:
            elements = torch.nn.functional.pad(self.columns, (0, 1), value=self.width)[elements]
        if world is not None:
            elements = elements + world.view(-1, *[1] * (elements.ndim - 1)) * (self.width + 1)
        return torch.nn.functional.embedding(elements, self._table)

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        """Values of each row in descending order and their columns, (worlds, m, width)."""
        values, order = self.V.double().reshape(-1, *self.V.shape[-2:]).sort(dim=-1, descending=True, stable=True)
        return values, order

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.V.shape[-2]

    # -- sets ----------------------------------------------------------------------------------------------------

    def value(self, mask: Any) -> Tensor:
        """Return the value of each set (see :meth:`SetFunction.value`)."""
        found = self._mask(mask)
        members = _members(found.reshape(-1, self.n))
        world, w = self._of_rows(len(members))
        out = torch.empty(len(members), dtype=self.dtype, device=self.device)
        for part in pieces(len(members), members.shape[-1] * self.rows, cached(self.device)):
            best = self._best(members[part], None if world is None else world[part])
            out[part] = best @ w if w.ndim == 1 else (best * w[part]).sum(-1)
        return out.reshape(found.shape[:-1])

    def gains(self, mask: Any, block: Any) -> Tensor:
        """Return what each element adds to each set (see :meth:`SetFunction.gains`)."""
        found = self._mask(mask)
        members = _members(found.reshape(-1, self.n)).reshape(*found.shape[:-1], -1)
        return self.gains_of(members, self._block(block, tuple(found.shape[:-1])))

    def gains_of(self, members: Tensor, block: Tensor, *, disjoint: bool = False) -> Tensor:
        """Return gains where sets are lists of elements, (..., R), filled up with ``n``.

        Args:
            members: The sets.
            block: Elements of each set's gains, (..., K).
            disjoint: No element of a block is a member of its set, which saves looking for the second best.
        """
        batch = members.shape[:-1]
        members = members.reshape(-1, members.shape[-1])
        block = block.expand(*batch, block.shape[-1]).reshape(len(members), -1)
        world, w = self._of_rows(len(members))
        out = torch.empty(len(members), block.shape[1], dtype=self.dtype, device=self.device)
        width = min(block.shape[1], max(1, BUDGET // self.rows))
        for part in pieces(len(members), max(members.shape[1], width) * self.rows, cached(self.device)):
            places = None if world is None else world[part]
            tops = self._tops(members[part], places, disjoint=disjoint)
            weights = w if w.ndim == 1 else w[part][:, :, None]
            for start in range(0, block.shape[1], width):
                some = block[part, start : start + width]
                own = self._lookup(some, places)
                better = own.sub_(_base(tops, some)).clamp_(min=0)
                gained = better @ weights if w.ndim == 1 else torch.bmm(better, weights)[..., 0]
                out[part, start : start + width] = gained
        return out.reshape(*batch, -1)

    def own_gains(self, sets: Tensor, partition: Partition, *, disjoint: bool = False) -> Tensor:
        """Return what each agent's own actions add (see :meth:`SetFunction.own_gains`)."""
        if sets.dtype == torch.bool:
            found = self._mask(sets)
            sets = _members(found.reshape(-1, self.n)).reshape(*found.shape[:-1], -1)
        batch, agents = sets.shape[:-1], partition.agents
        ordered = partition.plain and (not self.worlds or sets.shape[:-2] == self.worlds)
        if type(self) is not FacilityLocation or self.columns is not None or not ordered:
            return self.gains_of(sets, partition.index, disjoint=disjoint)
        # Blocks stand side by side in V: nothing needs to be looked up of an agent's own actions.
        best, *others = self._tops_of(sets, disjoint=disjoint)
        gains = self._over_own(best.reshape(-1, agents, self.rows), partition).reshape(*batch, partition.widest)
        if not others:
            return gains
        second, whose = others
        # Of an own action that serves a row best, what it adds is its lead over the second best.
        lead = best.sub_(second).mul_(self.weights if self.weights.ndim == 1 else self.weights[:, None])
        lead.masked_fill_(whose.div(partition.widest, rounding_mode="floor") != partition.number, 0)
        return gains.scatter_add_(-1, whose.remainder_(partition.widest), lead)

    def _over_own(self, best: Tensor, partition: Partition) -> Tensor:
        """Return what own actions add where rows are served by ``best (sets of all agents, agents, rows)``."""
        values = self.V.reshape(*self.V.shape[:-1], partition.agents, partition.widest)
        found = []
        for part in pieces(len(best), self.rows * self.n, cached(self.device)):
            some = values[part] if self.worlds else values
            better = (some - best[part].mT[..., None]).clamp_(min=0).flatten(-2)
            found.append(torch.matmul(self.weights if self.weights.ndim == 1 else self.weights[part, None], better))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _tops_of(self, members: Tensor, *, disjoint: bool) -> tuple[Tensor, ...]:
        """Return :meth:`_tops` of sets (..., R), made a part at a time."""
        flat = members.reshape(-1, members.shape[-1])
        world, _ = self._of_rows(len(flat))
        parts = pieces(len(flat), flat.shape[-1] * self.rows, cached(self.device))
        found = [self._tops(flat[p], None if world is None else world[p], disjoint=disjoint) for p in parts]
        whole = found[0] if len(found) == 1 else [torch.cat(some) for some in zip(*found)]
        return tuple(some.view(*members.shape[:-1], self.rows) for some in whole)

    def _best(self, members: Tensor, world: Tensor | None) -> Tensor:
        if not members.shape[-1]:
            return torch.zeros(len(members), self.rows, dtype=self.dtype, device=self.device)
        return self._lookup(members, world).amax(-2)

    def _tops(self, members: Tensor, world: Tensor | None, *, disjoint: bool) -> tuple[Tensor, ...]:
        """Return for each set and row the best value and, where needed, the second best, and whose the best is."""
        if disjoint or not members.shape[-1]:
            return (self._best(members, world),)
        found = self._lookup(members, world)
        best, place = found.max(-2)
        second = found.scatter_(-2, place[..., None, :], 0).amax(-2)
        return best, second, members.gather(-1, place)

    def _of_rows(self, count: int) -> tuple[Tensor | None, Tensor]:
        """Return the world of each of ``count`` sets, and weights of all rows, or of each set's rows."""
        world = None
        if self.worlds:
            world = torch.arange(self._count, device=self.device).repeat_interleave(count // self._count)
        weights = self.weights
        return world, weights if weights.ndim == 1 else weights[world]

    def last_gains(self) -> Tensor:
        """Return what each element adds to all others, (worlds, n)."""
        values = self.V if self.columns is None else self.V[..., self.columns]
        best, place = values.max(-1)
        lead = (best - values.scatter(-1, place[..., None], 0).amax(-1)) * self.weights
        out = torch.zeros(*self.worlds, self.n, dtype=self.dtype, device=self.device)
        return out.scatter_add_(-1, place, lead)

    def _columns_of_all(self) -> Tensor:
        flipped = self._table.reshape(self._count, self.width + 1, -1)[:, :-1]
        if self.columns is not None:
            flipped = flipped[:, self.columns]
        return flipped if self.worlds else flipped[0]

    def start(self) -> Growing:
        """Return an empty set that grows, for greedy algorithms."""
        return _Served(self)

    # -- extensions ----------------------------------------------------------------------------------------------

    def multilinear(self, x: Any) -> Tensor:
        r"""Return :math:`F(x)` of each point (see :meth:`SetFunction.multilinear`)."""
        return self._extend(self._point(x), gradient=False)

    def multilinear_grad(self, x: Any) -> Tensor:
        r"""Return :math:`\nabla F(x)` of each point (see :meth:`SetFunction.multilinear_grad`)."""
        return self._extend(self._point(x), gradient=True)

    def _extend(self, x: Tensor, *, gradient: bool) -> Tensor:
        values, order = self._sorted
        points = x.reshape(self._count, -1, self.n)
        q, others = self._merged(points)
        w = self.weights.double().expand(self._count, -1)[:, None, :, None]
        out = []
        for part in pieces(points.shape[1], values.numel()):
            some = q[:, part]
            places = order[:, None].expand(-1, some.shape[1], -1, -1)
            picked = some[:, :, None].expand(-1, -1, values.shape[1], -1).gather(-1, places)
            absent = (1 - picked).clamp_(min=TINY)
            before = torch.nn.functional.pad(absent[..., :-1], (1, 0), value=1).cumprod(-1)
            terms = picked.mul_(values[:, None]).mul_(before)
            if not gradient:
                out.append((terms * w).sum((-1, -2)))
                continue
            # Summed from the far end, without the element's own term: taking it away again would cancel.
            after = torch.nn.functional.pad(terms[..., 1:], (0, 1)).flip(-1).cumsum(-1).flip(-1)
            slope = before.mul_(values[:, None]).sub_(after.div_(absent)).mul_(w)
            target = torch.zeros_like(some)
            out.append(target.scatter_add_(-1, places.flatten(-2), slope.flatten(-2)))
        found = torch.cat(out, 1)
        if not gradient:
            return found.reshape(x.shape[:-1])
        if others is not None and self.columns is not None:
            found = found[..., self.columns] * others
        return found.reshape(x.shape)

    def _merged(self, points: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return for each column the probability that one of its elements is taken, and that no other one is."""
        if self.columns is None:
            return points, None
        log = (1 - points).clamp(min=TINY).log()
        absent = torch.zeros(*points.shape[:-1], self.width, dtype=log.dtype, device=log.device)
        absent.index_add_(-1, self.columns, log)
        return -torch.expm1(absent), (absent[..., self.columns] - log).exp()

    def policy_gains(self, x: Tensor, partition: Partition, z: Tensor) -> Tensor:
        """Return expected gains over what the others draw (see :meth:`SetFunction.policy_gains`)."""
        from modicum.submodular.functions.policy_extension import facility_gains

        return facility_gains(self._columns_of_all().mT.double(), self.weights.double(), x, partition, z)


class _Served(Growing):
    """A growing set that remembers how well each row is served."""

    f: FacilityLocation

    def __init__(self, f: FacilityLocation) -> None:
        super().__init__(f)
        self.served = torch.zeros(*f.worlds, f.rows, dtype=f.dtype, device=f.device)
        self.world = torch.arange(f._count, device=f.device) if f.worlds else None

    def gains(self, block: Tensor) -> Tensor:
        """Return what each element of a block adds, (worlds, K)."""
        block = block.expand(*self.f.worlds, block.shape[-1])
        found = [
            weighted(
                self.f._lookup(block[..., part], self.world).sub_(self.served[..., None, :]).clamp_(min=0),
                self.f.weights,
            )
            for part in pieces(block.shape[-1], self.f.rows * self.f._count)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def add(self, element: Tensor) -> None:
        """Take one element in, in each world."""
        super().add(element)
        self.served = torch.maximum(self.served, self.f._lookup(element, self.world))


def _members(mask: Tensor) -> Tensor:
    """Return the elements of each set, (sets, largest size), filled up with ``n``."""
    rows, elements = mask.nonzero(as_tuple=True)  # set by set
    counts = torch.bincount(rows, minlength=len(mask))
    widest = max(1, int(counts.max())) if len(mask) else 1
    found = torch.full((len(mask), widest), mask.shape[-1], device=mask.device)
    return found.masked_scatter_(torch.arange(widest, device=mask.device) < counts[:, None], elements)


def _base(tops: tuple[Tensor, ...], block: Tensor) -> Tensor:
    """Return how well each row is served without each element of the block."""
    best, *others = tops
    if not others:
        return best[:, None]
    second, whose = others
    return torch.where(whose[:, None] == block[..., None], second[:, None], best[:, None])
