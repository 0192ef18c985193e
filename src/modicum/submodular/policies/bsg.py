"""BSG: OSG where an agent learns only what the action that it played has added."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from modicum.errors import RecipeError
from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.osg import Experts, rounds_of
from modicum.types import Positive, PositiveInt


@policy("bsg", paper="arXiv:2305.12795", supplied={"horizon", "order", "seed"}, step="scale")
class BSG(Experts):
    r"""Play in order; each agent estimates losses from the one action that it played.

    .. math::
        \hat\ell_a = \frac{\ell_a [a \text{ was played}]}{p_a + \gamma_j}, \qquad
        \eta_j = L \sqrt{\frac{\ln(K T)}{2^{j-1} K}},\ \gamma_j = \eta_j / 2, \qquad
        \epsilon = L \sqrt{\frac{\ln J}{2 T}},\ J = \lceil \ln T \rceil

    with fixed shares of :math:`1 / (T - 1)`, and :math:`\ell_a` one minus what the action added to those before it over
    the largest value of one action, a bound that the agents know.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        horizon: Number of rounds T, at least 2.
        scale: Multiplies the rates (L).
        order: The agents' turns, from 0; by number where not given.
        seed: Seed of all draws; several for as many worlds.

    Raises:
        RecipeError: ``horizon`` is below 2, or a knob does not fit.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = BSG([2], horizon=100, scale=4.0)
        >>> for _ in range(100):
        ...     _ = policy.act()
        ...     policy.update(FacilityLocation([[1.0, 0.0], [0.0, 0.1]]))
        >>> bool(policy.probabilities()[0] > 0.6)
        True

    Cost:
        Two evaluations an agent.

    Deviates:
        Each expert's estimate goes by its own rate, where the authors' code shares one array between them. The
        largest value of one action is read off the objective; a robot would have to know a bound.

    Reference:
        Xu, Lin and Tzoumas, "Bandit Submodular Maximization for Multi-Robot Coordination in Unpredictable and
        Partially Observable Environments", RSS 2023, arXiv:2305.12795, and the authors' code.
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
        count = max(1, math.ceil(math.log(rounds_of(horizon))))
        super().__init__(blocks, horizon=horizon, count=count, scale=scale, order=order, seed=seed)
        sizes = self.partition.sizes.double()[:, None]
        halves = 2.0 ** torch.arange(count, dtype=torch.float64)
        self.rates = (torch.log(sizes * horizon) / (halves * sizes)).sqrt()
        self.meta_rate = math.sqrt(math.log(count) / (2 * horizon)) if count > 1 else 0.0

    def _learn(self, f: Objective) -> None:
        before, alone = self._before(f), self._alone(f)
        # Of these gains an agent sees the one of the action that it played.
        self.evaluations -= 2 * self.n + self.n - 2 * self.partition.agents
        played = self._played
        if played is None:
            raise RecipeError("BSG learns from the action that it played: call act before update.")
        place = played[..., None]
        most = alone.amax((-1, -2), keepdim=True)
        gain = before.gather(-1, place) / torch.where(most > 0, most, 1)
        loss = (1 - gain).clamp(0, 1)
        rates = (self._scale[..., 0] if self.worlds else self._scale) * self.rates
        estimate = loss / (self._chance(played)[..., None] + rates / 2)  # (worlds, N, experts)
        at = place[..., None, :].expand(*estimate.shape, 1)
        met = self.experts.gather(-1, at)[..., 0] * estimate
        raised = torch.zeros_like(self.experts).scatter_(-1, at, -(rates * estimate)[..., None])
        self.experts = self._mix(self.experts * (raised - raised.amax(-1, keepdim=True)).exp(), 1 / (self.horizon - 1))
        scale = self._scale[..., 0] if self.worlds else self._scale
        judged = -(scale * self.meta_rate) * met
        trust = self.trust * (judged - judged.amax(-1, keepdim=True)).exp()
        self.trust = trust / trust.sum(-1, keepdim=True)
