"""Hedge: every agent weighs its actions by what each has been worth alone, as DoReMi weighs domains by excess loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import policy
from modicum.submodular.draws import several
from modicum.submodular.functions.base import Objective
from modicum.submodular.geometry import mix_uniform, sample_actions
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.base import Policy
from modicum.types import Positive, UnitInterval


@policy("hedge", paper="arXiv:2305.10429", supplied={"seed"}, step="eta")
class Hedge(Policy):
    r"""Multiply each action's weight by the exponential of its value alone; nobody looks at what the others do.

    .. math::
        w_a = \frac{e^{\eta \sum_t f_t(a)}}{\sum_b e^{\eta \sum_t f_t(b)}}, \qquad p = (1 - \gamma) w + \gamma u

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        eta: The step; it scales with one over the objective. Several for as many worlds.
        gamma: Share of a uniform choice.
        seed: Seed of all draws; several for as many worlds.

    Raises:
        RecipeError: A knob is out of range.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = Hedge([2], eta=1.0, gamma=0.0)
        >>> policy.update(FacilityLocation([[1.0, 0.0]]))
        >>> round(float(policy.probabilities()[0]), 6)
        0.731059

    Cost:
        One evaluation for each action; no messages.

    Deviates:
        DoReMi weighs the domains of one batch by the loss in excess of a reference model's; here the weights are
        choices of agents, and the objective holds the excess: ``utility="loss"`` of
        :class:`~modicum.submodular.data_selection.DomainScheduler`, whose needs have the reference.

    Reference:
        Xie et al., "DoReMi: Optimizing Data Mixtures Speeds Up Language Model Pretraining", NeurIPS 2023,
        arXiv:2305.10429, Algorithm 1; Hedge: Freund and Schapire, 1997.
    """

    fixed: ClassVar[frozenset[str]] = frozenset({"logs"})

    def __init__(
        self,
        blocks: Blocks,
        *,
        eta: Positive | tuple[Positive, ...],
        gamma: UnitInterval = 0.001,
        seed: int | Sequence[int] = 0,
    ) -> None:
        super().__init__(blocks, seed=seed)
        eta = several(eta)
        steps = eta if isinstance(eta, tuple) else (eta,)
        if isinstance(eta, tuple) and (not self.worlds or len(eta) != len(self._seeds)):
            raise RecipeError(f"eta has {len(eta)} steps, which needs as many seeds, one for each world.")
        self.gamma = gamma
        self._eta = torch.tensor(steps, dtype=torch.float64).view(-1, *[1] * 2 if self.worlds else ())
        self.logs = torch.zeros_like(self._even())  # a weight itself would be 0 for good once it is too small

    def _shares(self) -> Tensor:
        weights = torch.where(self.partition.valid, self.logs, -torch.inf).softmax(-1)
        return mix_uniform(weights, self._uniform_choice, gamma=self.gamma)

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:  # noqa: ARG002
        return sample_actions(self._shares(), self._uniform("act", self.acts, 1)[..., 0])

    def _learn(self, f: Objective) -> None:
        self.logs = self.logs + self._eta * self._alone(f)

    def _state(self) -> dict[str, Tensor]:
        return {"logs": self.logs}

    def _load(self, state: dict[str, Tensor]) -> None:
        self.logs = state["logs"].clone()
