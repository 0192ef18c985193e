"""Policies without probabilities: they choose by an objective that they know, the hint or the last one revealed."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from modicum.submodular.functions.base import Objective
from modicum.submodular.geometry import sample_actions
from modicum.submodular.policies.base import Policy


class Remembering(Policy):
    """A policy that chooses by the hint, or by the last objective; uniformly before there is one.

    The objective itself is no tensor: a policy that goes on from a state chooses by what it decided in advance.
    """

    passing: ClassVar[frozenset[str]] = frozenset({"next"})
    _next: Tensor | None = None

    def _decide(self, f: Objective, turn: int) -> Tensor:
        """Return the actions that the policy would take on ``f``, (worlds, N)."""
        raise NotImplementedError

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:  # noqa: ARG002
        if hint is not None:
            return self._kept(self._spread(self._decide(hint, self.acts)))
        if self._next is not None:
            return self._kept(self._next)
        return self._kept(sample_actions(self._even(), self._uniform("act", self.acts, 1)[..., 0]))

    def _kept(self, actions: Tensor) -> Tensor:
        return actions

    def _learn(self, f: Objective) -> None:
        self._next = self._spread(self._decide(f, self.updates))

    def _spread(self, actions: Tensor) -> Tensor:
        return actions.expand(*self.worlds, self.partition.agents).clone()

    def _shares(self) -> Tensor:
        if self._next is None:
            return self._even()
        chosen = torch.nn.functional.one_hot(self._next.clamp(min=0), self.partition.widest).double()
        return chosen * (self._next >= 0)[..., None]

    def _state(self) -> dict[str, Tensor]:
        return {} if self._next is None else {"next": self._next}

    def _load(self, state: dict[str, Tensor]) -> None:
        self._next = state["next"].clone() if "next" in state else None
