"""Every agent chooses at random: what any policy must beat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.geometry import sample_actions
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.base import Policy


@policy("random", supplied={"seed"})
class Random(Policy):
    """Draw every agent's action uniformly.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        seed: Seed of all draws; several for as many worlds.

    Example:
        >>> Random([2, 2]).probabilities().tolist()
        [0.5, 0.5, 0.5, 0.5]

    Cost:
        None.

    Reference:
        None: a baseline.
    """

    def __init__(self, blocks: Blocks, *, seed: int | Sequence[int] = 0) -> None:
        super().__init__(blocks, seed=seed)

    def _shares(self) -> Tensor:
        return self._even()

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:  # noqa: ARG002
        return sample_actions(self._even(), self._uniform("act", self.acts, 1)[..., 0])
