"""Make a policy of the registry by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from modicum.registry import policy
from modicum.submodular.partition import Blocks
from modicum.submodular.policies.base import Policy


def make_policy(
    name: str,
    blocks: Blocks,
    *,
    W: Any = None,
    horizon: int | None = None,
    order: Sequence[int] | None = None,
    seed: int | Sequence[int] = 0,
    knobs: Mapping[str, Any] | None = None,
) -> Policy:
    """Return a policy, given whatever any of them may need.

    Args:
        name: Its name in the registry.
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        W: Weights of the averages.
        horizon: Number of rounds.
        order: The agents' turns.
        seed: Seed of all draws; several for as many worlds.
        knobs: The policy's own knobs.

    Raises:
        RecipeError: There is no such policy, or what it is given does not fit.

    Example:
        >>> make_policy("random", [2, 2], W=[[1.0]]).n
        4
    """
    entry = policy[name]
    offered = {"W": W, "horizon": horizon, "order": order, "seed": seed}
    supplied = {key: value for key, value in offered.items() if key in entry.facts.supplied}
    made: Policy = entry.function(blocks, **supplied, **(knobs or {}))
    return made
