"""Several policies on the same worlds: the best step of each, its utility by world and round, what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from modicum.registry import policy
from modicum.submodular.functions.base import Objective
from modicum.submodular.functions.greedy import count_joint
from modicum.submodular.partition import Partition
from modicum.submodular.policies.make import make_policy
from modicum.submodular.simulation import SMALL, Optimum, Trace, simulate

MakeWorld = Callable[[Sequence[int]], Any]


@dataclass(frozen=True)
class Variant:
    """A policy as it stands in a comparison.

    Attributes:
        name: Its name in the registry.
        knobs: Its knobs, without the step where that is tuned.
        hint: Rounds that it plays on the predicted objective; 0 without a hint.
        label: What it is called in the results.
    """

    name: str
    knobs: Mapping[str, Any] = field(default_factory=dict)
    hint: int = 0
    label: str = ""

    @property
    def step(self) -> str | None:
        """The knob to tune, or ``None`` where there is none or it is set."""
        knob: str | None = policy[self.name].facts.step
        return None if knob is None or knob in self.knobs else knob

    def grid(self, steps: Sequence[float], blocks: Sequence[Any]) -> list[float]:
        """Return the values of the step to try: these, or the policy's own.

        Args:
            steps: The grid of all policies whose step is one.
            blocks: Element numbers of each agent's actions, or sizes of blocks.
        """
        own = policy[self.name].facts.grid
        return list(steps if own is None else own([len(block) for block in Partition.of(blocks).blocks]))

    @property
    def local(self) -> bool:
        """Whether it depends on the graph."""
        return "W" in policy[self.name].facts.supplied


def variants(chosen: Sequence[tuple[str, Mapping[str, Any]]], hints: Sequence[int]) -> list[Variant]:
    """Return the variants of a comparison: each policy without a hint, and with one where it can use it.

    Args:
        chosen: Names and knobs of the policies.
        hints: Rounds played on a hint, 0 for none.

    Example:
        >>> [v.label for v in variants([("ma_spl", {}), ("osg", {}), ("last_greedy", {})], [0, 10])]
        ['ma_spl', 'ma_spl, hint 10', 'osg', 'last_greedy', 'last_greedy, hint']
    """
    found = []
    for name, knobs in chosen:
        uses = policy[name].facts.hints
        shown = ", ".join([name, *(f"{key} {value}" for key, value in knobs.items())])
        able = hints if uses == "rounds" else sorted({min(hint, 1) for hint in hints}) if uses == "whole" else [0]
        for hint in able:
            ending = "" if not hint else ", hint" if uses == "whole" else f", hint {hint}"
            found.append(Variant(name, knobs, hint, shown + ending))
    return found


def play(
    variant: Variant,
    world: MakeWorld,
    W: Any,
    *,
    seeds: Sequence[int],
    rounds: int,
    steps: Sequence[float] | None = None,
    optimum: bool = False,
    watch: Callable[[int, Tensor, Objective], None] | None = None,
    made: Any = None,
) -> Trace:
    """Play a variant on the worlds of ``seeds``, all at once; with steps, on each world with each step.

    Args:
        variant: The policy.
        world: Makes the worlds of some seeds.
        W: Weights of the averages.
        seeds: Seeds of worlds and policies.
        rounds: How many.
        steps: Values of the step; worlds go first by step, then by seed.
        optimum: Measure the optimum of each round: by trying all joint actions where they are few in all worlds
            together, else by a greedy that sees the objective.
        watch: See :func:`~modicum.submodular.simulation.simulate`.
        made: A world of these seeds, where it is made already.
    """
    values = [None] if steps is None else list(steps)
    every = [seed for _ in values for seed in seeds]
    knobs = dict(variant.knobs)
    if variant.step is not None and steps is not None:
        knobs[variant.step] = tuple(float(step) for step in steps for _ in seeds)
    scene = world(every) if made is None else made
    agents = make_policy(variant.name, scene.blocks, W=W, horizon=max(2, rounds), seed=every, knobs=knobs)
    hints: Any = True if variant.hint else None
    kind: Optimum = "exact" if count_joint(agents.partition) * len(every) <= SMALL else "greedy"
    return simulate(
        agents, scene, rounds=rounds, hints=hints, hint_rounds=max(1, variant.hint),
        optimum=kind if optimum else None, watch=watch,
    )  # fmt: skip


def tune(
    variant: Variant, world: MakeWorld, W: Any, *, seeds: Sequence[int], rounds: int, steps: Sequence[float]
) -> dict[str, float]:
    """Return the mean utility of a variant with each step, by the step as text.

    Args:
        variant: The policy.
        world: Makes the worlds of some seeds.
        W: Weights of the averages.
        seeds: Seeds of worlds and policies; others than those that results are reported on.
        rounds: How many.
        steps: Values of the step, where the policy has no grid of its own.
    """
    steps = variant.grid(steps, world(seeds).blocks)
    trace = play(variant, world, W, seeds=seeds, rounds=rounds, steps=steps)
    means = trace.utility.mean(0).reshape(len(steps), len(seeds)).mean(1)
    return {f"{step:g}": float(value) for step, value in zip(steps, means)}


def best_step(table: Mapping[str, float]) -> float:
    """Return the step of the highest utility; of equal ones the smallest.

    Example:
        >>> best_step({"0.1": 1.0, "1": 3.0, "10": 3.0})
        1.0
    """
    return float(max(table, key=lambda step: (table[step], -float(step))))


def summary(trace: Trace, *, points: int = 100) -> dict[str, Any]:
    """Return what a comparison keeps of a trace of several worlds, as plain data.

    Args:
        trace: The trace.
        points: How many points of its course are kept.
    """
    utility = trace.utility
    found: dict[str, Any] = {
        "utility": [float(value) for value in utility.mean(0)],
        "course": _course(trace, points),
        "bytes": trace.bytes // max(1, utility.shape[1]),
        "evaluations": trace.evaluations,
        "rounds": len(utility),
    }
    if trace.optimum is not None:
        found["ratio"] = [float(value) for value in trace.ratio()]
        found["regret"] = [float(value) for value in trace.regret()[-1]]
        found["optimum"] = trace.optimum_kind
    return found


def _course(trace: Trace, points: int) -> dict[str, Any]:
    """Return a course for each world: where stretches of rounds end, mean utility in each, and regret at its end."""
    values = trace.utility
    bounds = _stretches(len(values), points)
    worlds = torch.stack([values[a:b].mean(0) for a, b in pairwise(bounds)], 1)
    found: dict[str, Any] = {"rounds": bounds[1:], "worlds": _rounded(worlds)}
    if trace.optimum is not None:
        found["regret"] = _rounded(trace.regret()[[end - 1 for end in bounds[1:]]].T)
    return found


def choices(trace: Trace, *, points: int = 20) -> dict[str, Any]:
    """Return how often each position was chosen in each stretch of rounds, by all agents in all worlds together.

    Args:
        trace: The trace, of agents whose positions stand for the same things.
        points: How many stretches there are at most.

    Returns:
        ``rounds``, where stretches end, and ``shares``, a row of shares of the choices for each position.
    """
    bounds = _stretches(len(trace.actions), points)
    count = trace.partition.widest
    rows = [
        torch.bincount(trace.actions[a:b].flatten() + 1, minlength=count + 1)[1:] / trace.actions[a:b].numel()
        for a, b in pairwise(bounds)
    ]
    return {"rounds": bounds[1:], "shares": _rounded(torch.stack(rows, 1))}


def _stretches(count: int, most: int) -> list[int]:
    ends: list[int] = torch.linspace(0, count, min(most, count) + 1).round().long().tolist()
    return ends


def _rounded(rows: Tensor) -> list[list[float]]:
    return [[round(float(v), 6) for v in row] for row in rows]
