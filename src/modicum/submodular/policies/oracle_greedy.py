"""Sequential greedy that sees the objective of the round before it acts: what no policy can know."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.policies.last_greedy import LastGreedy


@policy("oracle_greedy", supplied={"order", "seed"}, hints="truth")
class OracleGreedy(LastGreedy):
    """Pick in turn what adds most to the objective of this very round.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        order: The agents' turns, from 0; by number where not given.
        seed: Not used; every policy has one.

    Raises:
        RecipeError: ``act`` is not given the objective.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> OracleGreedy([2]).act(FacilityLocation([[0.5, 1.0]])).tolist()
        [1]

    Cost:
        Two evaluations for each action, one agent after the other.

    Reference:
        Fisher, Nemhauser and Wolsey, "An Analysis of Approximations for Maximizing Submodular Set Functions II", 1978:
        at least half of the optimum.
    """

    sees: ClassVar[Literal["past", "now"]] = "now"

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:
        if hint is None:
            raise RecipeError("oracle_greedy must be shown the objective of the round: act(f).")
        return super()._choose(hint, rounds)

    def _learn(self, f: Objective) -> None:
        """Learn nothing: the next objective is shown before the next choice."""
