"""Best responses to what the others did last, without learning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.remembering import Remembering
from modicum.types import Decay


@policy("best_response", supplied={"seed"}, hints="whole")
class BestResponse(Remembering):
    r"""Answer the others' last actions on the last objective, or on the predicted one where there is a hint.

    .. math::
        a_i \leftarrow \arg\max_{a \in V_i} \hat f(A_{-i} \cup a) - \hat f(A_{-i}) \text{ with probability } 1 - p

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        laziness: Probability ``p`` with which an agent repeats its action; agents that all answer at once herd.
        seed: Seed of all draws; several for as many worlds.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = BestResponse([2], laziness=0.0)
        >>> policy.update(FacilityLocation([[0.5, 1.0]]))
        >>> policy.act().tolist()
        [1]

    Cost:
        Two evaluations for each action; everybody must hear of everybody's last action.

    Reference:
        Marden, Arslan and Shamma, "Joint Strategy Fictitious Play with Inertia for Potential Games", IEEE TAC 2009.
    """

    def __init__(self, blocks: Blocks, *, laziness: Decay = 0.5, seed: int | Sequence[int] = 0) -> None:
        super().__init__(blocks, seed=seed)
        self.laziness = laziness
        self._done = torch.full((*self.worlds, self.partition.agents), -1)

    def _decide(self, f: Objective, turn: int) -> Tensor:
        agents = self.partition.agents
        chosen = self.partition.chosen(self._done)
        mine = self.partition.owner == torch.arange(agents, device=chosen.device)[:, None]
        gains = self._gains(f, chosen[..., None, :] & ~mine)
        best = torch.where(self.partition.valid, gains, -1).argmax(-1)
        stay = (self._uniform("stay", turn, 1)[..., 0] < self.laziness) & (self._done >= 0)
        return torch.where(stay, self._done, best)

    def overrule(self, actions: Tensor) -> None:
        """Answer these actions in the next round (see :meth:`Policy.overrule`)."""
        self._done = actions

    def _kept(self, actions: Tensor) -> Tensor:
        self._done = actions
        return actions

    def _state(self) -> dict[str, Tensor]:
        return {**super()._state(), "done": self._done}

    def _load(self, state: dict[str, Tensor]) -> None:
        super()._load(state)
        self._done = state["done"].clone()
