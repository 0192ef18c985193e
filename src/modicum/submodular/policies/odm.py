r"""ODM: Exp3 with weights that all agents share, for choices of data by the losses of what was drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.geometry import sample_actions
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.base import Policy
from modicum.types import Decay


@policy("odm", paper="arXiv:2312.02406", supplied={"seed"})
class ODM(Policy):
    r"""Draw by an estimate of what each position of a block is worth alone, made from the positions that were drawn.

    .. math::
        R_k \leftarrow \alpha R_k + (1 - \alpha) \frac{f(k)}{p_k} \text{ for each drawn } k, \qquad
        p = (1 - K \epsilon_t)\,\mathrm{softmax}(\epsilon_t R) + \epsilon_t, \qquad
        \epsilon_t = \min\Bigl(\frac1K, \sqrt{\frac{\ln K}{K t}}\Bigr)

    Position ``k`` of every block is one thing, such as a domain of data, and has one estimate; of several agents that
    draw it the mean counts. A shorter block lacks the last positions.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        memory: Share of an estimate that is kept when its position is drawn again (the paper's smoothing).
        seed: Seed of all draws; several for as many worlds.

    Raises:
        RecipeError: ``memory`` is out of range, or ``update`` comes before ``act``.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = ODM([2])
        >>> for _ in range(50):
        ...     _ = policy.act()
        ...     policy.update(FacilityLocation([[9.0, 0.0], [0.0, 1.0]]))
        >>> bool(policy.probabilities()[0] > 0.6)
        True

    Cost:
        One evaluation an agent; all hear what each has drawn.

    Deviates:
        The paper has one learner that draws the domains of one batch; here it draws for all agents, and the exponent
        has this round's rate, not the last one's. The paper's reward is the loss of what was drawn, which an objective
        holds under ``utility="loss"`` of :class:`~modicum.submodular.data_selection.DomainScheduler`.

    Reference:
        Albalak, Pan, Raffel and Wang, "Efficient Online Data Mixing For Language Model Pre-Training", 2023,
        arXiv:2312.02406, Algorithm 1; Exp3: Auer, Cesa-Bianchi, Freund and Schapire, 2002.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"rewards"})
    passing: ClassVar[frozenset[str]] = frozenset({"played"})

    def __init__(self, blocks: Blocks, *, memory: Decay = 0.9, seed: int | Sequence[int] = 0) -> None:
        super().__init__(blocks, seed=seed)
        self.memory = memory
        self.rewards = torch.zeros(*self.worlds, self.partition.widest, dtype=torch.float64)
        self._played: Tensor | None = None

    def _shares(self) -> Tensor:
        sizes = self.partition.sizes[:, None].double()
        rate = torch.minimum(1 / sizes, (sizes.log() / (sizes * (self.updates + 1))).sqrt())
        raised = torch.where(self.partition.valid, rate * self.rewards[..., None, :], -torch.inf)
        return ((1 - sizes * rate) * raised.softmax(-1) + rate) * self.partition.valid

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:  # noqa: ARG002
        self._played = sample_actions(self._shares(), self._uniform("act", self.acts, 1)[..., 0])
        return self._played

    def overrule(self, actions: Tensor) -> None:
        """Learn from these actions (see :meth:`Policy.overrule`)."""
        self._played = actions

    def _learn(self, f: Objective) -> None:
        if self._played is None:
            raise RecipeError("ODM learns from the actions that it played: call act before update.")
        place = self._played[..., None]
        worth = self._alone(f).expand(*self.worlds, -1, -1).gather(-1, place) / self._chance(self._played)[..., None]
        self.evaluations -= self.n - self.partition.agents  # of the values alone, those of the played actions count
        drawn = torch.zeros_like(self._shares()).scatter_(-1, place, 1.0)
        count = drawn.sum(-2)
        mean = (drawn * worth).sum(-2) / count.clamp(min=1)
        moved = self.memory * self.rewards + (1 - self.memory) * mean
        self.rewards = torch.where(count > 0, moved, self.rewards)

    def _state(self) -> dict[str, Tensor]:
        return {"rewards": self.rewards, **({} if self._played is None else {"played": self._played})}

    def _load(self, state: dict[str, Tensor]) -> None:
        self.rewards = state["rewards"].clone()
        self._played = state["played"].clone() if "played" in state else None
