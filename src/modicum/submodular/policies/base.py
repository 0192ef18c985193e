"""What every policy does: choose an action for each agent, and learn from the objective once it is revealed.

A policy of several worlds has a seed for each; everything that it holds and returns then has the worlds first, and
each world goes exactly as it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.submodular.draws import keys, rounds_of_uniform, seeds_of
from modicum.submodular.functions.base import Objective, SetFunction, check_empty, refuse_falling, trusted
from modicum.submodular.partition import Blocks, Partition

# Numbers that are drawn for rounds to come, which depend on names alone: one call costs as much as many.
AHEAD = 1 << 13


class Policy:
    """A policy of agents that choose together.

    Args:
        blocks: Element numbers of each agent's actions (disjoint, covering 0 … n-1), or sizes of blocks.
        seed: Seed of all draws; several for as many worlds.
        agents: Numbers of the agents that this process decides for; all where not given.
        device: Where it computes.

    Attributes:
        evaluations: Evaluations of the objective of one world so far, two for a gain.
    """

    sees: ClassVar[Literal["past", "now"]] = "past"  # "now": act is given the objective of the round itself
    floor: float = 0.0  # share of uniform choices that whoever plays puts in place of the policy's

    def __init__(
        self,
        blocks: Blocks,
        *,
        seed: int | Sequence[int] = 0,
        agents: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.partition = Partition.of(blocks, device=device)
        self._seeds, self.worlds = seeds_of(seed)
        self.device = self.partition.device
        self.agents = torch.arange(self.partition.agents, device=self.device) if agents is None else agents
        self._all = agents is None or len(self.agents) == self.partition.agents
        self.acts = self.updates = self.evaluations = 0
        self._keys: dict[str, Tensor] = {}
        self._drawn: dict[tuple[str, int], tuple[int, Tensor]] = {}  # numbers of some rounds from a first one on

    @property
    def n(self) -> int:
        """Number of elements."""
        return self.partition.n

    # -- the protocol --------------------------------------------------------------------------------------------

    def act(self, hint: Objective | None = None, *, rounds: int = 1) -> Tensor:
        """Choose an action for every agent.

        Args:
            hint: A predicted objective, used for this choice and then forgotten; policies that cannot use one ignore
                it.
            rounds: How many rounds are played on the hint before choosing.

        Returns:
            Positions inside the agents' own blocks, (worlds, N); -1 where an agent idles.
        """
        if rounds < 1:
            raise RecipeError(f"rounds is {rounds}, expected at least 1.")
        if hint is not None:
            self._check(hint)
        actions = self._choose(hint, rounds)
        self.acts += 1
        return actions

    def overrule(self, actions: Tensor) -> None:
        """Take in what was played in place of what :meth:`act` returned, where a policy learns from its actions."""

    def update(self, f: Objective) -> None:
        """Learn from the objective of the round, which is revealed after acting.

        Raises:
            RecipeError: It has other elements, or is not monotone.
        """
        self._check(f)
        self._learn(f)
        self.updates += 1

    def probabilities(self) -> Tensor:
        """Return the probabilities of the next choice, block by block, (worlds, n)."""
        shares = self._shares()
        return shares[..., self._valid]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as tensors: what was learnt, how far the draws went, and their seeds."""
        counts = torch.tensor([self.acts, self.updates, self.evaluations])
        return {"policy": self._tag(), "counts": counts, "seeds": torch.tensor(self._seeds), **self._state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state, as if there had been no interruption.

        Raises:
            RecipeError: It is the state of another policy, or of other blocks.
        """
        own, name = self._state(), type(self).__name__
        if "policy" in state and not torch.equal(state["policy"].cpu(), self._tag()):
            raise RecipeError(f"the state is of {bytes(state['policy'].tolist()).decode()}, expected that of {name}.")
        if missing := sorted({"policy", "counts", "seeds", *own} - self.passing - state.keys()):
            raise RecipeError(f"state of {name}: {', '.join(missing)} is missing. Is it another policy's?")
        for part, tensor in own.items():
            if part in self.fixed and state[part].shape != tensor.shape:
                raise RecipeError(
                    f"state of {name}: {part} has shape {tuple(state[part].shape)}, expected {tuple(tensor.shape)}. "
                    "The blocks or worlds are others."
                )
        if len(state["seeds"]) != len(self._seeds):
            raise RecipeError(f"the state is of {len(state['seeds'])} worlds, expected {len(self._seeds)}.")
        self.acts, self.updates, self.evaluations = (int(count) for count in state["counts"])
        self._seeds = [int(seed) for seed in state["seeds"]]
        self._keys.clear()
        self._drawn.clear()
        self._load({part: tensor for part, tensor in state.items() if part not in ("policy", "counts", "seeds")})

    fixed: ClassVar[frozenset[str]] = frozenset({"x"})  # parts of the state whose shape is known beforehand
    passing: ClassVar[frozenset[str]] = frozenset()  # parts that are there only after some round

    def _tag(self) -> Tensor:
        return torch.tensor(list(type(self).__name__.encode()), dtype=torch.uint8)

    # -- what a policy is made of --------------------------------------------------------------------------------

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:
        raise NotImplementedError

    def _learn(self, f: Objective) -> None:
        """Learn nothing."""

    def _shares(self) -> Tensor:
        """Return the probabilities of each held agent's actions, (worlds, held, widest)."""
        raise NotImplementedError

    def _state(self) -> dict[str, Tensor]:
        return {}

    def _load(self, state: dict[str, Tensor]) -> None:
        """Take nothing."""

    # -- helpers -------------------------------------------------------------------------------------------------

    def _uniform(self, purpose: str, turn: int, count: int) -> Tensor:
        """Draw numbers for each held agent, (worlds, held, count); nobody may change them in place."""
        first, made = self._drawn.get((purpose, count), (0, self._index[:0]))
        if not first <= turn < first + len(made):
            if purpose not in self._keys:
                found = keys(self._seeds, purpose, self.agents.tolist(), device=self.device)
                self._keys[purpose] = found if self.worlds else found[0]
            key = self._keys[purpose]
            turns = max(1, AHEAD // max(1, key.numel() * count))
            first, made = turn, rounds_of_uniform(key, turn, turns, count)
            self._drawn[purpose, count] = (first, made)
        return made[turn - first]

    @cached_property
    def _index(self) -> Tensor:
        """Elements of each held agent's block, (held, widest)."""
        return self.partition.index if self._all else self.partition.index[self.agents]

    @cached_property
    def _valid(self) -> Tensor:
        """Which of these are actions."""
        return self.partition.valid if self._all else self.partition.valid[self.agents]

    @cached_property
    def _sizes(self) -> int:
        """Number of actions of the held agents."""
        return int(self._valid.sum())

    @cached_property
    def _uniform_choice(self) -> Tensor:
        valid = self._valid.double()
        return (valid / valid.sum(-1, keepdim=True)).expand(*self.worlds, *valid.shape)

    def _even(self) -> Tensor:
        """Return uniform probabilities, (worlds, held, widest)."""
        return self._uniform_choice.clone()

    def _chance(self, actions: Tensor) -> Tensor:
        """Return how likely these actions were, (worlds, N), the share of uniform ones that a player adds included."""
        p = self._shares().gather(-1, actions[..., None])[..., 0]
        return (1 - self.floor) * p + self.floor / self.partition.sizes

    def _check(self, f: Objective) -> None:
        n = getattr(f, "n", None)
        if n != self.n:
            raise RecipeError(f"the objective has {n} elements, but the blocks cover {self.n}.")
        worlds = tuple(getattr(f, "worlds", ()))
        if worlds not in ((), self.worlds):
            own = f"of {self.worlds[0]} worlds, one for each seed" if self.worlds else "of one world"
            raise RecipeError(f"the objective is of {worlds[0]} worlds, but the policy {own}.")
        check_empty(f)

    def _alone(self, f: Objective) -> Tensor:
        """Return the value of each action alone, (worlds, N, widest)."""
        before = self.evaluations
        if isinstance(f, SetFunction):
            found = f.first_gains()
            if not f.trusted:
                empty = torch.zeros(*f.worlds, self.n, dtype=torch.bool, device=found.device)
                refuse_falling(found, empty, torch.arange(self.n, device=found.device))
            found = self.partition.cut(found.double())
        else:
            found = self._gains(f, torch.zeros(self.partition.agents, self.n, dtype=torch.bool))
        self.evaluations = before + self.n
        return found

    def _gains(self, f: Objective, mask: Tensor, block: Tensor | None = None) -> Tensor:
        """Return gains of each agent's own actions, (..., held, widest), for sets (..., held, n).

        Raises:
            RecipeError: A gain is negative or no number: the objective is not monotone.
        """
        whole = block is None and self._all
        block = self._index if block is None else block
        self.evaluations += 2 * self._sizes
        if isinstance(f, SetFunction):
            gains = f.own_gains(mask, self.partition) if whole else f.gains(mask, block)
            if not trusted(f):
                refuse_falling(gains, mask, block)
            return gains.double()
        elements = block.expand(*mask.shape[:-1], block.shape[-1]).reshape(-1, block.shape[-1])
        rows = [
            torch.as_tensor(f.gains(row, some)).double().flatten()
            for row, some in zip(mask.reshape(-1, self.n), elements)
        ]
        gains = torch.stack(rows).reshape(*mask.shape[:-1], -1)
        refuse_falling(gains, mask, block)
        return gains
