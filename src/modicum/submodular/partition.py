"""Which actions belong to which agent."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError

CPU = torch.device("cpu")
Blocks: TypeAlias = Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Partition:
    """The blocks of a partition of 0 … n-1, one for each agent.

    Attributes:
        blocks: Element numbers of each agent's actions.
        device: Where the index tensors are.
    """

    blocks: tuple[tuple[int, ...], ...]
    device: torch.device = CPU

    @classmethod
    def of(cls, blocks: Blocks, *, device: torch.device | str = "cpu") -> Partition:
        """Read blocks as a user gives them: element numbers for each agent, or sizes of blocks in order.

        Raises:
            RecipeError: A block is empty, two overlap, or they do not cover 0 … n-1.

        Example:
            >>> Partition.of([2, 1]).blocks == Partition.of([[0, 1], [2]]).blocks
            True
        """
        rows = [_row(block) for block in blocks]
        if not rows:
            raise RecipeError("blocks are empty, expected at least one agent with one action.")
        sizes = [row for row in rows if isinstance(row, int)]
        if sizes and len(sizes) < len(rows):
            raise RecipeError("blocks mix sizes and lists of elements. Give one kind.")
        if any(size < 1 for size in sizes):
            agent = next(i for i, size in enumerate(sizes) if size < 1)
            raise RecipeError(f"blocks: agent {agent} has {sizes[agent]} actions, expected at least 1.")
        if sizes:
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return cls(tuple(tuple(range(a, a + k)) for a, k in zip(starts, sizes)), torch.device(device))
        owner: dict[int, int] = {}
        lists = [row for row in rows if not isinstance(row, int)]
        for agent, row in enumerate(lists):
            if not row:
                raise RecipeError(f"blocks: agent {agent} has no action. Give it one, or leave the agent out.")
            for element in row:
                if element in owner:
                    whose = f"agent {owner[element]} and agent {agent}" if owner[element] != agent else f"agent {agent}"
                    raise RecipeError(
                        f"blocks: element {element} stands twice, with {whose}. Blocks must be disjoint: give each "
                        "agent's copy of an action a number of its own."
                    )
                owner[element] = agent
        if missing := sorted(set(range(len(owner))) - owner.keys()):
            raise RecipeError(
                f"blocks: element {missing[0]} belongs to no agent, though {max(owner)} does. "
                f"Blocks must cover 0 to n-1."
            )
        return cls(tuple(map(tuple, lists)), torch.device(device))

    @property
    def agents(self) -> int:
        """How many agents there are."""
        return len(self.blocks)

    @cached_property
    def n(self) -> int:
        """How many elements there are."""
        return sum(map(len, self.blocks))

    @cached_property
    def widest(self) -> int:
        """Number of actions of the agent that has most."""
        return max(map(len, self.blocks))

    @cached_property
    def even(self) -> bool:
        """Whether all blocks have the same size."""
        return all(len(block) == self.widest for block in self.blocks)

    @cached_property
    def sizes(self) -> Tensor:
        """Number of actions of each agent."""
        return torch.tensor([len(block) for block in self.blocks], device=self.device)

    @cached_property
    def index(self) -> Tensor:
        """Element numbers, (agents, widest); short blocks repeat their first element, where ``valid`` is false."""
        rows = [[*block, *[block[0]] * (self.widest - len(block))] for block in self.blocks]
        return torch.tensor(rows, device=self.device)

    @cached_property
    def valid(self) -> Tensor:
        """Which places of ``index`` hold an action."""
        return torch.arange(self.widest, device=self.device) < self.sizes[:, None]

    @cached_property
    def order(self) -> Tensor:
        """Element numbers block by block."""
        return self.index[self.valid]

    @cached_property
    def owner(self) -> Tensor:
        """The agent of each element."""
        owner = torch.empty(self.n, dtype=torch.long, device=self.device)
        owner[self.order] = torch.repeat_interleave(torch.arange(self.agents, device=self.device), self.sizes)
        return owner

    @cached_property
    def plain(self) -> bool:
        """Whether the blocks are of one size and stand in order, so that a reshape cuts them out."""
        return self.even and bool((self.order == torch.arange(self.n, device=self.device)).all())

    @cached_property
    def mine(self) -> Tensor:
        """Which agent is which, (agents, agents)."""
        return torch.eye(self.agents, dtype=torch.bool, device=self.device)

    @cached_property
    def number(self) -> Tensor:
        """The agents' numbers, (agents, 1)."""
        return torch.arange(self.agents, device=self.device)[:, None]

    @cached_property
    def starts(self) -> Tensor:
        """The first element of each block."""
        return self.index[:, 0].contiguous()

    def at(self, place: Tensor) -> Tensor:
        """Return the elements at positions of the agents' blocks, (..., agents); any for a position that is none."""
        if self.plain:
            return place + self.starts
        inside = place.clamp(0, self.widest - 1)[..., None]
        return self.index.expand(*place.shape, self.widest).gather(-1, inside)[..., 0]

    def cut(self, x: Tensor) -> Tensor:
        """Return all blocks of ``x (..., n)`` as (..., agents, widest), zero where there is no action."""
        if self.plain:
            return x.reshape(*x.shape[:-1], self.agents, self.widest)
        return x[..., self.index] * self.valid if not self.even else x[..., self.index]

    def own(self, x: Tensor, agents: Tensor | None = None) -> Tensor:
        """Return from each agent's row of ``x (..., rows, n)`` its own block, (..., rows, widest).

        Args:
            x: A row for each agent.
            agents: Whose the rows are; all agents' in order where not given.
        """
        index, valid = (self.index, self.valid) if agents is None else (self.index[agents], self.valid[agents])
        found = x.gather(-1, index.expand(*x.shape[:-1], self.widest))
        return found if self.even else found * valid

    def put(self, x: Tensor, values: Tensor, agents: Tensor | None = None) -> Tensor:
        """Write ``values (..., rows, widest)`` into each row's own block of ``x``, in place, and return it."""
        index, valid = (self.index, self.valid) if agents is None else (self.index[agents], self.valid[agents])
        if self.even:
            return x.scatter_(-1, index.expand(values.shape), values)
        rows, places = valid.nonzero(as_tuple=True)
        x[..., rows, index[rows, places]] = values[..., rows, places]
        return x

    def chosen(self, actions: Tensor) -> Tensor:
        """Return the set of what agents chose, (..., n) bool, from positions in their blocks; -1 chooses nothing."""
        elements = self.at(actions.clamp(min=0))
        mask = torch.zeros(*actions.shape[:-1], self.n, dtype=torch.bool, device=actions.device)
        return mask.scatter_(-1, elements, actions >= 0)


def _row(block: Any) -> int | list[int]:
    """Return a block as a size or as element numbers, also where it comes from an array or tensor."""
    plain = block.tolist() if hasattr(block, "tolist") else block
    try:
        return plain if isinstance(plain, int) else [operator.index(element) for element in plain]
    except TypeError:
        raise RecipeError(f"blocks hold {plain!r}, expected sizes or lists of element numbers.") from None
