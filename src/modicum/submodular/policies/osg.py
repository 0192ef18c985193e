r"""OSG: agents choose in a fixed order, each by experts that follow a moving best action.

It needs an order, and a way from each agent to all after it; the guarantee is 1 / (1 + c). Its theoretical rates are
small: with rates a hundred times larger it beat MA-OSMA in tracking, so tune ``scale``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import policy
from modicum.submodular.draws import several
from modicum.submodular.functions.base import Objective
from modicum.submodular.functions.greedy import turns_of
from modicum.submodular.geometry import sample_actions
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.base import Policy
from modicum.types import Positive, PositiveInt


class Experts(Policy):
    """Agents in an order, each with experts at several rates and weights of the experts.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        horizon: Number of rounds.
        count: Number of experts.
        scale: Multiplies the rates; one for each world where several are given.
        order: The agents' turns.
        seed: Seed of all draws.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"experts", "trust"})
    passing: ClassVar[frozenset[str]] = frozenset({"played"})

    def __init__(
        self,
        blocks: Blocks,
        *,
        horizon: int,
        count: int,
        scale: float | tuple[float, ...],
        order: Sequence[int] | None,
        seed: int | Sequence[int],
    ) -> None:
        super().__init__(blocks, seed=seed)
        scale = several(scale)
        scales = scale if isinstance(scale, tuple) else (scale,)
        if isinstance(scale, tuple) and len(scale) != len(self._seeds):
            raise RecipeError(f"scale has {len(scale)} numbers, which needs as many seeds, one for each world.")
        self.horizon, self.count = horizon, count
        self._scale = torch.tensor(scales, dtype=torch.float64).view(-1, *[1] * 3 if self.worlds else ())
        self.order = turns_of(order, self.partition.agents)
        self.experts = self._even()[..., None, :].expand(*self.worlds, -1, count, -1).clone()
        self.trust = torch.full((*self.worlds, self.partition.agents, count), 1 / count, dtype=torch.float64)
        self._played: Tensor | None = None

    def _shares(self) -> Tensor:
        return (self.trust[..., None] * self.experts).sum(-2)

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:  # noqa: ARG002
        shares = self._shares()
        if not self.partition.even:
            shares = shares * self.partition.valid
        self._played = sample_actions(shares, self._uniform("act", self.acts, 1)[..., 0])
        return self._played

    def overrule(self, actions: Tensor) -> None:
        """Learn from these actions (see :meth:`Policy.overrule`)."""
        self._played = actions

    def _before(self, f: Objective) -> Tensor:
        """Return what each agent's actions add to those played by the agents before it, (worlds, N, widest)."""
        if self._played is None:
            self._played = self._choose(None, 1)
        agents = self.partition.agents
        elements = self.partition.at(self._played)
        place = torch.empty(agents, dtype=torch.long)
        place[torch.tensor(self.order)] = torch.arange(agents)
        earlier = place < place[:, None]
        members = torch.where(earlier, elements[..., None, :], self.n)
        mask = torch.zeros(*members.shape[:-1], self.n + 1, dtype=torch.bool, device=members.device)
        return self._gains(f, mask.scatter_(-1, members, True)[..., :-1])

    def _mix(self, weights: Tensor, share: float) -> Tensor:
        """Give every action a share of the total, and normalise."""
        sizes = self.partition.sizes[:, None, None].double()
        mixed = share * weights.sum(-1, keepdim=True) / sizes + (1 - share) * weights
        mixed = mixed * self.partition.valid[:, None]
        return mixed / mixed.sum(-1, keepdim=True)

    def _state(self) -> dict[str, Tensor]:
        played = {} if self._played is None else {"played": self._played}
        return {"experts": self.experts, "trust": self.trust, **played}

    def _load(self, state: dict[str, Tensor]) -> None:
        self.experts, self.trust = state["experts"].clone(), state["trust"].clone()
        self._played = state["played"].clone() if "played" in state else None


def rounds_of(horizon: int) -> int:
    """Return a horizon that rates of experts can be made of.

    Raises:
        RecipeError: It is below 2.
    """
    if horizon < 2:
        raise RecipeError(f"horizon is {horizon}, expected at least 2 rounds: the rates divide by its logarithm.")
    return horizon


@policy("osg", paper="arXiv:2209.12429", supplied={"horizon", "order", "seed"}, step="scale")
class OSG(Experts):
    r"""Play in order; each agent mixes fixed-share experts by how they did on what its actions would have added.

    .. math::
        \gamma_j = \sqrt{\log(K T) / 2^{j-1}},\ j = 1 \dots \lceil \log_2 T \rceil, \qquad
        p_j \leftarrow \tfrac{\beta}{K} \textstyle\sum v + (1 - \beta) v,\ v = p_j e^{-\gamma_j \ell}, \qquad
        q_j \leftarrow q_j e^{-g \langle p_j, \ell \rangle}

    with :math:`\beta = 1/T`, :math:`g = \sqrt{\log J / T}`, and the loss of an action minus what it adds to the actions
    played before it, over the agent's largest value of one action.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        horizon: Number of rounds T, at least 2.
        scale: Multiplies both rates.
        order: The agents' turns, from 0; by number where not given.
        seed: Seed of all draws; several for as many worlds.

    Raises:
        RecipeError: ``horizon`` is below 2, or a knob does not fit.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = OSG([2], horizon=8)
        >>> _ = policy.act()
        >>> policy.update(FacilityLocation([[1.0, 0.0], [0.0, 0.5]]))
        >>> round(float(policy.probabilities()[0]), 6)
        0.629079

    Cost:
        Two evaluations for each action, and its value alone; memory of log2 T numbers for each action.

    Deviates:
        Losses are shifted before they are exponentiated, which changes nothing but that large rates do not overflow.

    Reference:
        Xu, Zhou and Tzoumas, "Online Submodular Coordination with Bounded Tracking Regret", RA-L 2023,
        arXiv:2209.12429, and the authors' code.
    """

    def __init__(
        self,
        blocks: Blocks,
        *,
        horizon: PositiveInt,
        scale: Positive | tuple[Positive, ...] = 1.0,
        order: Sequence[int] | None = None,
        seed: int | Sequence[int] = 0,
    ) -> None:
        count = math.ceil(math.log2(rounds_of(horizon)))
        super().__init__(blocks, horizon=horizon, count=count, scale=scale, order=order, seed=seed)
        halves = 2.0 ** torch.arange(count, dtype=torch.float64)
        self.rates = (torch.log(self.partition.sizes.double() * horizon)[:, None] / halves).sqrt()
        self.meta_rate = math.sqrt(math.log(count) / horizon) if count > 1 else 0.0

    def _learn(self, f: Objective) -> None:
        gains, alone = self._before(f), self._alone(f)
        most = alone.amax(-1, keepdim=True)
        loss = torch.where(most > 0, -gains / torch.where(most > 0, most, 1), 0)
        met = (self.experts * loss[..., None, :]).sum(-1)
        raised = -(self._scale * self.rates[..., None]) * loss[..., None, :]
        weights = self.experts * (raised - raised.amax(-1, keepdim=True)).exp()
        self.experts = self._mix(weights, 1 / self.horizon)
        scale = self._scale[..., 0] if self.worlds else self._scale
        judged = -(scale * self.meta_rate) * met
        trust = self.trust * (judged - judged.amax(-1, keepdim=True)).exp()
        self.trust = trust / trust.sum(-1, keepdim=True)
