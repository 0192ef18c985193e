"""Greedy algorithms: the best subset of k elements, one action for each agent in turn, and the best of all."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.submodular.functions.base import (
    BUDGET,
    Growing,
    Objective,
    SetFunction,
    check_empty,
    pieces,
    refuse_rising,
    trusted,
    values_of,
)
from modicum.submodular.partition import Blocks, Partition


class Selection(list[int]):
    """Elements in the order in which they were picked.

    Attributes:
        gains: What each added when it was picked.
    """

    def __init__(self, picks: Sequence[int], gains: Sequence[float]) -> None:
        super().__init__(picks)
        self.gains = list(gains)

    @property
    def value(self) -> float:
        """Value of all that were picked."""
        return float(sum(self.gains))


def greedy(f: Objective, k: int) -> Selection:
    r"""Pick ``k`` elements, each the one that adds most.

    Gains only fall as the set grows, so that an old gain is an upper bound: only elements whose bound is above the best
    known gain are evaluated again.

    .. math::
        a_s = \arg\max_{a \notin A_{s-1}} f(A_{s-1} \cup a) - f(A_{s-1})

    Args:
        f: The objective.
        k: How many, at most as many as there are elements.

    Returns:
        The elements with their gains, which never rise; of equal ones the lowest number comes first.

    Raises:
        RecipeError: ``k`` is below 1 or above the number of elements, the empty set has a value, a gain is negative or
            no number, or one rises: the objective is not submodular.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> picks = greedy(FacilityLocation([[3, 1, 0], [0, 2, 2]]), 2)
        >>> picks, picks.gains
        ([0, 1], [3.0, 2.0])

    Cost:
        One gain of every element, and then of few.

    Reference:
        Minoux, "Accelerated Greedy Algorithms for Maximizing Submodular Set Functions", 1978.
    """
    if getattr(f, "worlds", ()):
        raise UnsupportedError("greedy takes one world. Give the worlds one after the other.")
    if not isinstance(k, (int, np.integer)) or not 1 <= k <= f.n:
        raise RecipeError(f"k is {k}, expected 1 to {f.n}, the number of elements.")
    grown = growing(f)
    bounds = _numbers(grown.gains(torch.arange(f.n)))
    fresh = np.zeros(f.n, dtype=np.int64)
    picks: list[int] = []
    gains: list[float] = []
    for turn in range(k):
        batch = 4
        while fresh[best := int(bounds.argmax())] != turn:
            # The elements of the highest bounds together: a gain alone costs little more than the call.
            stale = np.flatnonzero(fresh != turn)
            if len(stale) > batch:
                stale = stale[np.argpartition(-bounds[stale], batch - 1)[:batch]]
            stale = np.union1d(stale[bounds[stale] > -np.inf], [best])
            found = grown.gains(torch.from_numpy(stale))
            if not trusted(f):
                before = torch.from_numpy(bounds[stale])
                refuse_rising(found.double().cpu(), before, grown.mask, torch.from_numpy(stale), value=sum(gains))
            bounds[stale] = np.minimum(bounds[stale], _numbers(found))  # rounding must not make a gain rise
            fresh[stale] = turn
            batch = min(2 * batch, 256)
        picks.append(best)
        gains.append(float(bounds[best]))
        bounds[best] = -np.inf
        grown.add(torch.tensor(best))
    return Selection(picks, gains)


def sequential_greedy(f: Objective, blocks: Blocks, *, order: Sequence[int] | None = None) -> Selection:
    """Let agents pick in turn, each the action that adds most to what those before it picked.

    Args:
        f: The objective.
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        order: The agents' turns, from 0; by number where not given.

    Returns:
        The elements in the order of the turns, with their gains. Of equal ones the lowest position wins.

    Raises:
        RecipeError: Blocks or order do not fit.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> f = FacilityLocation([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0.01, 0, 0], [0, 0, 0, 0.1]])
        >>> sequential_greedy(f, [2, 2]), sequential_greedy(f, [2, 2], order=[1, 0])
        ([1, 3], [2, 0])

    Cost:
        One gain of every action.

    Reference:
        Fisher, Nemhauser and Wolsey, "An Analysis of Approximations for Maximizing Submodular Set Functions II", 1978.
    """
    partition = Partition.of(blocks)
    turns = turns_of(order, partition.agents)
    actions, gains = greedy_actions(f, partition, turns)
    if actions.ndim != 1:
        raise UnsupportedError("sequential_greedy takes one world. For several, take the policy oracle_greedy.")
    picks = [partition.blocks[agent][int(actions[agent])] for agent in turns]
    return Selection(picks, [float(gains[agent]) for agent in turns])


def turns_of(order: Sequence[int] | None, agents: int) -> list[int]:
    """Return the order of the agents' turns.

    Raises:
        RecipeError: It does not name every agent once.
    """
    turns = list(range(agents)) if order is None else [int(agent) for agent in order]
    if sorted(turns) != list(range(agents)):
        raise RecipeError(f"order is {turns}, expected each of the agents 0 to {agents - 1} once.")
    return turns


def growing(f: Objective) -> Growing:
    """Return an empty set of ``f`` that grows.

    Raises:
        RecipeError: The empty set has a value.
    """
    check_empty(f)
    return f.start() if isinstance(f, SetFunction) else Growing(f)


def greedy_actions(f: Objective, partition: Partition, turns: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return positions in the blocks and gains, (worlds, agents), of agents that choose in turn."""
    grown = growing(f)
    worlds = tuple(getattr(f, "worlds", ()))
    actions = torch.zeros(*worlds, partition.agents, dtype=torch.long, device=grown.mask.device)
    gains = torch.zeros(*worlds, partition.agents, dtype=torch.float64, device=grown.mask.device)
    for agent in turns:
        block = torch.tensor(partition.blocks[agent], device=grown.mask.device)
        found = grown.gains(block).double()
        place = found.argmax(-1)  # the first of equal ones
        actions[..., agent], gains[..., agent] = place, found.gather(-1, place[..., None])[..., 0]
        grown.add(block[place])
    return actions, gains


def count_joint(partition: Partition) -> int:
    """Return how many joint actions there are."""
    count = 1
    for block in partition.blocks:
        count *= len(block)
    return count


def best_joint(f: Objective, partition: Partition) -> tuple[Tensor, Tensor]:
    """Return the best joint action and its value by trying all, for each world.

    Returns:
        Positions in the blocks, (worlds, agents), and values, (worlds,).
    """
    worlds = tuple(getattr(f, "worlds", ()))
    best = torch.full(worlds, -torch.inf, dtype=torch.float64)
    actions = torch.zeros(*worlds, partition.agents, dtype=torch.long)
    joint = product(*(range(len(block)) for block in partition.blocks))
    size = pieces(count_joint(partition), partition.n * 8 * (worlds[0] if worlds else 1))[0].stop
    while some := list(islice(joint, min(size, BUDGET))):
        tried = torch.tensor(some)
        masks = partition.chosen(tried)
        values = values_of(f, masks.expand(*worlds, *masks.shape)).cpu()
        top, place = values.max(-1)
        better = top > best
        best = torch.where(better, top, best)
        actions = torch.where(better[..., None], tried[place], actions)
    return actions, best


def _numbers(gains: Tensor) -> Any:
    return gains.double().cpu().numpy().copy()
