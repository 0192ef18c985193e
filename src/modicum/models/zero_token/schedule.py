"""Which physical layer runs when: the order in which a looped model visits its layers.

A schedule is a list of ``(physical layer, cycle)``. Head and tail layers run once, in cycle 0. An entry's position in
the schedule is also its slot in the key-value cache, so that every visit of a layer keeps keys of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from modicum.errors import RecipeError
from modicum.types import NonNegativeInt, PositiveInt

Order: TypeAlias = Literal["cycle", "sequence", "cycle_rev"]
VisitId: TypeAlias = tuple[int, int]


def cycle_schedule(
    n_layers: int,
    n_cycles: int,
    *,
    n_head: NonNegativeInt = 1,
    n_tail: NonNegativeInt = 1,
    order: Order | Sequence[int] = "cycle",
) -> list[VisitId]:
    """Return the visits of a looped model as ``(physical layer, cycle)``.

    Args:
        n_layers: Physical layers.
        n_cycles: How often the middle layers run.
        n_head: First layers that run once.
        n_tail: Last layers that run once.
        order: ``"cycle"`` runs the whole middle stack, then again; ``"sequence"`` runs each middle layer ``n_cycles``
            times in a row; ``"cycle_rev"`` is ``"cycle"`` with the last cycle backwards. A list of physical layers is
            taken as it is; the n-th visit of a layer is its cycle n - 1, and the other arguments do not apply.

    Returns:
        The visits, ``n_head + n_tail + n_cycles * (n_layers - n_head - n_tail)`` of them.

    Raises:
        RecipeError: The numbers leave no layer to cycle, or the list names a layer that is not there.

    Example:
        >>> [layer for layer, _ in cycle_schedule(4, 2)]
        [0, 1, 2, 1, 2, 3]
        >>> cycle_schedule(3, 2, order=[0, 1, 1, 2])
        [(0, 0), (1, 0), (1, 1), (2, 0)]
    """
    if not isinstance(order, str):
        return _explicit(n_layers, order)
    if isinstance(n_cycles, bool) or not isinstance(n_cycles, int) or n_cycles < 1:
        raise RecipeError(f"n_cycles is {n_cycles!r}, expected an integer of at least 1.")
    if n_head < 0 or n_tail < 0:
        raise RecipeError(f"n_head is {n_head} and n_tail is {n_tail}, expected 0 or more.")
    middle = range(n_head, n_layers - n_tail)
    if not middle and (n_cycles > 1 or n_head + n_tail != n_layers):
        raise RecipeError(
            f"n_head={n_head} and n_tail={n_tail} leave none of {n_layers} layers to cycle. "
            f"Lower them to a sum of at most {n_layers - 1}."
        )
    visits: list[VisitId]
    if order == "sequence":
        visits = [(layer, cycle) for layer in middle for cycle in range(n_cycles)]
    elif order in ("cycle", "cycle_rev"):
        visits = [(layer, cycle) for cycle in range(n_cycles) for layer in middle]
        if order == "cycle_rev" and n_cycles > 1:
            visits[-len(middle) :] = reversed(visits[-len(middle) :])
    else:
        raise RecipeError(f"There is no order {order!r}. Known: cycle, cycle_rev, sequence, or a list of layers.")
    head = [(layer, 0) for layer in range(n_head)]
    tail = [(layer, 0) for layer in range(n_layers - n_tail, n_layers)]
    return head + visits + tail


def _explicit(n_layers: int, order: Sequence[int]) -> list[VisitId]:
    wrong = [layer for layer in order if isinstance(layer, bool) or layer not in range(n_layers)]
    if wrong or not order:
        raise RecipeError(
            f"The schedule {list(order)} names layer {wrong[:1] or 'none'}; there are 0 to {n_layers - 1}."
        )
    seen: Counter[int] = Counter()
    visits = []
    for layer in order:
        visits.append((layer, seen[layer]))
        seen[layer] += 1
    return visits


def cache_slot(layer: int, cycle: int, *, n_layers: PositiveInt, n_head: NonNegativeInt, n_tail: NonNegativeInt) -> int:
    """Return the cache slot of a visit when the order is ``"cycle"``; slots of the tail count from the end, as -1.

    Example:
        >>> cycle_schedule(6, 2).index((2, 1)) == cache_slot(2, 1, n_layers=6, n_head=1, n_tail=1) == 6
        True
    """
    if layer < n_head:
        return layer
    if layer < n_layers - n_tail:
        return n_head + cycle * (n_layers - n_head - n_tail) + (layer - n_head)
    return layer - n_layers


@dataclass(frozen=True)
class Stages:
    """A schedule cut where a model may leave it: head, one list of visits for each cycle, tail; all with slots."""

    head: tuple[tuple[int, int, int], ...]
    cycles: tuple[tuple[tuple[int, int, int], ...], ...]
    tail: tuple[tuple[int, int, int], ...]

    def slot(self, layer: int, cycle: int) -> int:
        """Return the slot of a visit of the loop."""
        return next(slot for piece in self.cycles for (*visit, slot) in piece if visit == [layer, cycle])

    def of_cycles(self, count: int) -> list[tuple[tuple[int, int, int], ...]]:
        """Return the visits of the first ``count`` cycles by cycle; those that cannot be told apart as one piece."""
        if len(self.cycles) == 1:
            return [tuple(entry for entry in self.cycles[0] if entry[1] < count)]
        return list(self.cycles[:count])

    def without(self, skip: Collection[VisitId]) -> Stages:
        """Return the stages without some visits; the others keep their slots."""

        def kept(piece: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
            return tuple(entry for entry in piece if entry[:2] not in skip)

        return Stages(kept(self.head), tuple(kept(piece) for piece in self.cycles), kept(self.tail))


def stages(schedule: Sequence[VisitId], middle: Collection[int]) -> Stages:
    """Cut ``schedule`` into head, cycles and tail, each visit as ``(layer, cycle, slot)``.

    When the visits of the ``middle`` layers do not come cycle by cycle (order ``"sequence"``), they are a single piece
    that cannot be left early.
    """
    entries = [(layer, cycle, slot) for slot, (layer, cycle) in enumerate(schedule)]
    inside = [slot for slot, (layer, _) in enumerate(schedule) if layer in middle]
    if not inside:
        return Stages(tuple(entries), (), ())
    first, last = inside[0], inside[-1] + 1
    body = entries[first:last]
    cycles = [cycle for _, cycle, _ in body]
    pieces = [[e for e in body if e[1] == c] for c in range(1 + max(cycles))] if cycles == sorted(cycles) else [body]
    return Stages(tuple(entries[:first]), tuple(map(tuple, pieces)), tuple(entries[last:]))
