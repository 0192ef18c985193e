"""RAG: the agent that gains most among its undecided neighbours decides first, and tells them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.registry import policy
from modicum.submodular.communication import Simulated, Weights, network
from modicum.submodular.functions.base import Objective
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.remembering import Remembering


@policy("rag", paper="arXiv:2204.07520", supplied={"W", "seed"}, hints="whole")
class RAG(Remembering):
    r"""Decide in the order of gains, among neighbours, on the last objective or on a predicted one.

    Every undecided agent computes its best gain given the actions of its decided neighbours. One whose gain is no
    smaller than those of all its undecided neighbours decides. This goes on until all have.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        W: Weights, or a :class:`~modicum.submodular.communication.Simulated` network, of graphs that change or lose
            messages too; agents that have a weight are neighbours.
        seed: Seed of the first choice, before any objective is known; several for as many worlds.

    Raises:
        RecipeError: Blocks or weights do not fit, or messages come late: an agent waits for its neighbours' answers.
        UnsupportedError: The network is between processes.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> f = FacilityLocation([[1, 0, 0, 0], [0, 1.1, 1, 0], [0, 0, 0, 0.1]])
        >>> policy = RAG([2, 2], [[0.5, 0.5], [0.5, 0.5]])
        >>> policy.update(f)
        >>> policy.act().tolist()
        [1, 1]

    Cost:
        Two evaluations for each action of the undecided agents in each iteration; two messages to each neighbour and
        iteration: a gain, and an action. At most as many iterations as agents.

    Deviates:
        Equal gains go to the lower number, which the authors leave open.

    Reference:
        Xu and Tzoumas, "Resource-Aware Distributed Submodular Maximization: A Paradigm for Multi-Robot
        Decision-Making", CDC 2022, arXiv:2204.07520, Algorithm 1.
    """

    def __init__(self, blocks: Blocks, W: Weights, *, seed: int | Sequence[int] = 0) -> None:
        super().__init__(blocks, seed=seed)
        communication = network(W, self.partition.agents)
        if not isinstance(communication, Simulated):
            raise UnsupportedError("RAG plays on one machine. Give it weights, or a Simulated network.")
        if communication.delay:
            raise RecipeError(f"delay is {communication.delay}, but RAG's agents wait for answers. Take delay 0.")
        self.communication = communication

    def _decide(self, f: Objective, turn: int) -> Tensor:
        agents = self.partition.agents
        others = ~torch.eye(agents, dtype=torch.bool)
        near = (self.communication.weights(turn) > 0) & others  # whom an agent hears
        linked = (self.communication.W > 0) & others
        worlds = tuple(getattr(f, "worlds", ()))
        actions = torch.full((*worlds, agents), -1)
        number = torch.arange(agents)
        while bool((actions < 0).any()):
            known = actions[..., None, :].expand(*worlds, agents, agents)
            masks = self.partition.chosen(torch.where(near, known, -1))
            gains = torch.where(self.partition.valid, self._gains(f, masks), -1)
            place = gains.argmax(-1)
            best = gains.gather(-1, place[..., None])[..., 0]
            free = actions < 0
            # Another wins by a larger gain, or by a lower number at an equal one.
            wins = (best[..., None, :] > best[..., None]) | (
                (best[..., None, :] == best[..., None]) & (number < number[:, None])
            )
            beaten = (wins & near & free[..., None, :]).any(-1)
            actions = torch.where(free & ~beaten, place, actions)
            # Two messages of 8 bytes to every neighbour, from those who took part.
            self.communication.bytes += int((free[..., None] & linked).sum()) * 16
        return actions
