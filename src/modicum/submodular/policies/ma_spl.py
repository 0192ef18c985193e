r"""MA-SPL: as MA-OSMA, on the extension in which every agent draws one action. The default of our recipes.

What an agent's action adds is asked of sets of at most one action for each other agent, which is what will be played.
The guarantee, 1 - c/e, needs no knowledge of the curvature ``c``.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor

from modicum.knobs import known
from modicum.registry import policy
from modicum.submodular.communication import Weights
from modicum.submodular.functions.base import Objective, SetFunction, no_closed_form
from modicum.submodular.functions.facility import FacilityLocation
from modicum.submodular.geometry import project_capped_simplex
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.gossip import Common, Gossip, Settings
from modicum.submodular.relaxation import draw_members, policy_surrogate_grad_exact, sample_scale
from modicum.types import Positive


@policy("ma_spl", paper="arXiv:2509.22596", supplied={"W", "seed"}, step="eta", hints="rounds")
class MASPL(Gossip):
    r"""Climb the surrogate of the policy extension, average with neighbours, project.

    .. math::
        \hat g_a = (1 - \tfrac1e) [f(S \cup a) - f(S)] + \tfrac1e [f(V) - f(V \setminus a)], \qquad
        [x_i]_{V_i} \leftarrow \Pi([y_i]_{V_i} + \eta \hat g)

    where ``S`` holds one action for each other agent, drawn from agent i's copy and present with probability ``z``, of
    density :math:`\propto e^{z-1}`. The second term is linear; it is 0 where actions are duplicated.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        W: Doubly stochastic weights of the averages, (N, N), a function from the round to them, or a
            :class:`~modicum.submodular.communication.Communication`.
        eta: The step; it scales with one over the objective.
        **shared: See :class:`~modicum.submodular.policies.gossip.Settings`.

    Raises:
        RecipeError: Blocks, weights or a knob do not fit.
        UnsupportedError: ``gradient="exact"`` for an objective without a closed form.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> f = FacilityLocation([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0.01, 0, 0], [0, 0, 0, 0.1]])
        >>> policy = MASPL([2, 2], [[0.5, 0.5], [0.5, 0.5]], eta=0.1, gradient="exact")
        >>> for _ in range(100):
        ...     policy.update(f)
        >>> policy.act().tolist()
        [0, 0]

    Cost:
        Two evaluations for each action of an agent, and one more, half of which depend on the objective alone; n
        numbers to each neighbour.

    Deviates:
        Put together from a summary of the publication, and checked against its inequality. An agent that has not been
        heard of yet counts as absent.

    Reference:
        Zhang et al., "MA-SPL", NeurIPS 2025, arXiv:2509.22596.
    """

    def __init__(
        self, blocks: Blocks, W: Weights, *, eta: Positive | tuple[Positive, ...], **shared: Unpack[Common]
    ) -> None:
        super().__init__(blocks, W, Settings(eta=eta, **known(MASPL, shared)))
        self._last: tuple[Objective, Tensor] | None = None

    def _gradient(self, f: Objective, point: Tensor, turn: int, purpose: str) -> Tensor:
        if self.settings.gradient == "exact":
            return self._exact(f, point)
        others = self._uniform(f"{purpose}-set", turn, self.partition.agents)
        z = sample_scale(self._uniform(f"{purpose}-scale", turn, 1), c=1.0)
        members = draw_members(point, self.partition, z, others, self._rows)
        return (self._over(f, members) * (1 - 1 / math.e)).add_(self._linear(f), alpha=1 / math.e)

    def _over(self, f: Objective, members: Tensor) -> Tensor:
        if type(f) is FacilityLocation:
            # Own actions are never among the others', so that no second best is needed.
            self.evaluations += self._sizes + len(self.agents)
            if self._all:
                return f.own_gains(members, self.partition, disjoint=True).double()
            return f.gains_of(members, self._index, disjoint=True).double()
        mask = torch.zeros(*members.shape[:-1], self.n + 1, dtype=torch.bool, device=members.device)
        return self._gains(f, mask.scatter_(-1, members, True)[..., :-1])

    def _linear(self, f: Objective) -> Tensor:
        """Return what each own action adds to all others; computed once for an objective that does not change."""
        if not isinstance(f, SetFunction) or not f.trusted:
            # An objective of a user's may be changed in place: the same object is no sign of the same values.
            worlds = f.worlds if isinstance(f, SetFunction) else ()
            return self._gains(f, torch.ones(*worlds, len(self.agents), self.n, dtype=torch.bool, device=self.device))
        if self._last is None or self._last[0] is not f:
            cut = self.partition.cut(f.last_gains().double())
            self.evaluations += self._sizes + 1
            self._last = (f, cut if self._all else cut[..., self.agents, :])
        return self._last[1]

    def _exact(self, f: Objective, point: Tensor) -> Tensor:
        if not isinstance(f, SetFunction) or not f.exact:
            raise no_closed_form(f, "policy extension")
        if self._all:
            return policy_surrogate_grad_exact(f, point, self.partition)
        # One agent's copy in the place of all: only its own row is read.
        rows = point.expand(*point.shape[:-2], self.partition.agents, -1)
        return policy_surrogate_grad_exact(f, rows, self.partition)[..., self.agents, :]

    def _step(self, own: Tensor, gradient: Tensor) -> Tensor:
        return project_capped_simplex(self._moved(own, gradient))
