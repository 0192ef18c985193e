"""Sequential greedy without learning, on a prediction or on yesterday's objective: central, and hard to beat."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.functions.greedy import greedy_actions, turns_of
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.remembering import Remembering


@policy("last_greedy", supplied={"order", "seed"}, hints="whole")
class LastGreedy(Remembering):
    r"""Let agents pick in turn what adds most to the last objective, or to the predicted one where there is a hint.

    .. math::
        a_i = \arg\max_{a \in V_i} \hat f(A_{<i} \cup a) - \hat f(A_{<i})

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        order: The agents' turns, from 0; by number where not given.
        seed: Seed of the first choice, before any objective is known; several for as many worlds.

    Raises:
        RecipeError: Blocks or order do not fit.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> policy = LastGreedy([2])
        >>> policy.update(FacilityLocation([[0.5, 1.0]]))
        >>> policy.act().tolist()
        [1]

    Cost:
        Two evaluations for each action, one agent after the other; a centre, or an order and a way to all.

    Reference:
        None: a baseline. Greedy itself: Fisher, Nemhauser and Wolsey, 1978.
    """

    def __init__(self, blocks: Blocks, *, order: Sequence[int] | None = None, seed: int | Sequence[int] = 0) -> None:
        super().__init__(blocks, seed=seed)
        self.order = turns_of(order, self.partition.agents)

    def _decide(self, f: Objective, turn: int) -> Tensor:  # noqa: ARG002
        self.evaluations += 2 * self.n
        return greedy_actions(f, self.partition, self.order)[0]
