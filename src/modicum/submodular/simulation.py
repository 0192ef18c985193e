"""Run a policy against objectives that are revealed round by round, and measure it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.submodular.functions.base import Objective, SetFunction, values_of
from modicum.submodular.functions.greedy import best_joint, count_joint, greedy_actions
from modicum.submodular.partition import Partition
from modicum.submodular.policies.base import Policy
from modicum.types import NonNegativeInt, PositiveInt

SMALL = 20_000  # joint actions up to which the optimum is found by trying all
Optimum: TypeAlias = Literal["exact", "greedy", "auto"]


@runtime_checkable
class World(Protocol):
    """What changes while the agents act: it has an objective for the present round, and moves by their actions."""

    def objective(self) -> Objective: ...
    def step(self, actions: Tensor, /) -> None: ...


Objectives: TypeAlias = Objective | Sequence[Objective] | Callable[[int], Objective] | World
Hints: TypeAlias = Objective | Sequence[Objective] | Callable[[int], Objective] | Literal[True] | None


@dataclass
class Trace:
    """What happened in a simulation.

    Attributes:
        actions: Positions that were chosen, (T, worlds, N); -1 where an agent idled.
        utility: Value of the chosen actions, (T, worlds) in float64.
        optimum: Value of the best actions of the round, (T, worlds), where it was asked for.
        optimum_actions: These actions.
        optimum_kind: ``exact`` when all joint actions were tried, ``greedy`` for a greedy that sees the objective,
            which is a lower bound of the optimum.
        bytes: What all agents sent, in all rounds, of all processes.
        evaluations: Evaluations of the objective of one world by the policy, in all rounds and processes.
    """

    actions: Tensor
    utility: Tensor
    optimum: Tensor | None = None
    optimum_actions: Tensor | None = None
    optimum_kind: str | None = None
    bytes: int = 0
    evaluations: int = 0
    partition: Partition = field(repr=False, default_factory=lambda: Partition.of([1]))

    def ratio(self) -> Tensor:
        """Return utility over optimum, summed over the rounds, (worlds).

        Raises:
            RecipeError: The simulation did not measure the optimum.
        """
        best = self._best()
        return self.utility.sum(0) / best.sum(0)

    def regret(self, share: float = 1.0) -> Tensor:
        r"""Return the dynamic regret against a share :math:`\rho` of the optimum, cumulated over rounds, (T, worlds).

        Args:
            share: The share; :func:`~modicum.submodular.relaxation.surrogate_ratio` of the curvature for MA-OSMA.

        Raises:
            RecipeError: The simulation did not measure the optimum.
        """
        return (share * self._best() - self.utility).cumsum(0)

    def path_length(self) -> Tensor:
        """Return how many elements enter or leave the optimum over all rounds, (worlds).

        Raises:
            RecipeError: The simulation did not measure the optimum.
        """
        self._best()
        if self.optimum_actions is None:
            raise RecipeError("The optimal actions are not known.")
        masks = self.partition.chosen(self.optimum_actions)
        return (masks[1:] ^ masks[:-1]).sum((0, -1))

    def _best(self) -> Tensor:
        if self.optimum is None:
            raise RecipeError("The optimum was not measured: simulate(…, optimum='auto').")
        return self.optimum


@guarded
def simulate(
    policy: Policy,
    objectives: Objectives,
    *,
    rounds: NonNegativeInt | None = None,
    hints: Hints = None,
    hint_rounds: PositiveInt = 1,
    optimum: Optimum | None = None,
    watch: Callable[[int, Tensor, Objective], None] | None = None,
) -> Trace:
    """Let a policy act and learn, round by round.

    Args:
        policy: The policy, which goes on from its present state.
        objectives: One function for all rounds, a sequence of functions, a function from the round to one, or a world
            with ``objective()`` and ``step(actions)``.
        rounds: How many; the length of a sequence where not given.
        hints: Predicted objectives, by round or one for all, or ``True`` for those of the world's ``predict()``.
        hint_rounds: How many rounds are played on a hint.
        optimum: Measure the best actions of each round too: ``exact`` by trying all, ``greedy`` by a greedy that sees
            the objective, ``auto`` by trying all where there are few.
        watch: Called after each choice with the round, the actions and the objective.

    Returns:
        Actions, utilities and costs.

    Raises:
        RecipeError: Neither ``rounds`` nor a finite sequence says how many, or a sequence is too short.

    Example:
        >>> from modicum.submodular import MASPL, FacilityLocation
        >>> f = FacilityLocation([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0.01, 0, 0], [0, 0, 0, 0.1]])
        >>> policy = MASPL([2, 2], [[0.5, 0.5], [0.5, 0.5]], eta=1.0, init="all")
        >>> trace = simulate(policy, f, rounds=200, optimum="auto")
        >>> trace.optimum_kind, bool(trace.utility[-20:].mean() > 1.9)
        ('exact', True)
    """
    count = _rounds(objectives, rounds)
    partition = policy.partition
    kind = None if optimum is None else optimum
    if kind == "auto":
        kind = "exact" if count_joint(partition) <= SMALL else "greedy"
    if isinstance(hints, Sequence) and len(hints) < count:
        raise RecipeError(f"there are {len(hints)} hints, but {count} rounds.")
    before = _spent(policy)
    actions, utility, best, best_actions = [], [], [], []
    known: tuple[Objective, Tensor, Tensor] | None = None
    static = isinstance(objectives, SetFunction)  # another object may be the same and have changed
    for number in range(count):
        f = _objective(objectives, number)
        hint = f if policy.sees == "now" else _hint(hints, objectives, number)
        chosen = policy.act(hint, rounds=hint_rounds)
        joint = gathered(policy, chosen)
        actions.append(joint.cpu())
        utility.append(values_of(f, partition.chosen(joint)).cpu())
        if watch is not None:
            watch(number, joint, f)
        if kind is not None:
            if known is None or known[0] is not f or not static:
                known = (f, *_best(f, partition, kind))
            best_actions.append(known[1].expand(*policy.worlds, -1).cpu())
            best.append(known[2].expand(policy.worlds).cpu())
        policy.update(f)
        if isinstance(objectives, World):
            objectives.step(joint)
    sent, evaluations = _of_all(policy, _spent(policy) - before)
    return Trace(
        actions=torch.stack(actions) if actions else torch.zeros(0, *policy.worlds, partition.agents, dtype=torch.long),
        utility=torch.stack(utility) if utility else torch.zeros(0, *policy.worlds, dtype=torch.float64),
        optimum=torch.stack(best) if best else None,
        optimum_actions=torch.stack(best_actions) if best else None,
        optimum_kind=kind,
        bytes=sent,
        evaluations=evaluations,
        partition=partition,
    )


def _spent(policy: Policy) -> Tensor:
    return torch.tensor([getattr(getattr(policy, "communication", None), "bytes", 0), policy.evaluations])


def _of_all(policy: Policy, spent: Tensor) -> list[int]:
    """Add up what the agents spent, also where each is in a process of its own."""
    if len(policy.agents) < policy.partition.agents:
        import torch.distributed as dist

        spent = spent.to(policy.device)
        dist.all_reduce(spent, group=getattr(getattr(policy, "communication", None), "group", None))
    return [int(part) for part in spent]


def gathered(policy: Policy, actions: Tensor) -> Tensor:
    """Return the actions of all agents, also where each process chose for its own alone."""
    if actions.shape[-1] == policy.partition.agents:
        return actions
    import torch.distributed as dist

    group = getattr(getattr(policy, "communication", None), "group", None)
    parts = [torch.empty_like(actions) for _ in range(policy.partition.agents)]
    dist.all_gather(parts, actions.contiguous(), group=group)
    return torch.cat(parts, -1)


def _best(f: Objective, partition: Partition, kind: str) -> tuple[Tensor, Tensor]:
    if kind == "exact":
        return best_joint(f, partition)
    actions, gains = greedy_actions(f, partition, range(partition.agents))
    return actions, gains.sum(-1)


def _rounds(objectives: Objectives, rounds: int | None) -> int:
    if isinstance(objectives, Sequence):
        if rounds is not None and rounds > len(objectives):
            raise RecipeError(f"rounds is {rounds}, but there are {len(objectives)} objectives.")
        return len(objectives) if rounds is None else _count(rounds)
    if rounds is None:
        raise RecipeError("rounds is missing: without a finite sequence of objectives, say how many rounds to play.")
    return _count(rounds)


def _count(rounds: int) -> int:
    if rounds < 0:
        raise RecipeError(f"rounds is {rounds}, expected at least 0.")
    return rounds


def _objective(objectives: Any, number: int) -> Objective:
    if isinstance(objectives, World):
        return objectives.objective()
    if isinstance(objectives, Sequence):
        found: Objective = objectives[number]
        return found
    if isinstance(objectives, Objective):
        return objectives
    return objectives(number)


def _hint(hints: Hints, objectives: Any, number: int) -> Objective | None:
    if hints is None:
        return None
    if hints is True:
        if not hasattr(objectives, "predict"):
            raise RecipeError("hints=True needs a world with predict(). Give the predicted objectives instead.")
        return objectives.predict()
    if isinstance(hints, Objective):
        return hints
    return hints[number] if isinstance(hints, Sequence) else hints(number)
