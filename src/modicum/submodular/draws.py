"""Uniform numbers that depend on names alone: the seed, the agent, the round and the place.

A policy draws thousands of numbers a round, each of them owed to one agent: on one machine all agents are drawn
together, on several each draws its own, and both must draw the same. A generator for each agent and round would cost
more than the round itself. Here the number at a place is a hash of the agent's key, the round and the place (the
finaliser of SplitMix64, applied twice), in integer tensor arithmetic that is the same on every device.

Reference: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014, figure 17.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modicum.errors import RecipeError
from modicum.random import derive_seed

STEP = -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio, as a signed number
FIRST = -4658895280553007687  # 0xBF58476D1CE4E5B9
SECOND = -7723592293110705685  # 0x94D049BB133111EB
LEVELS = 2.0**-53
HOST = (
    (np.uint64(30), np.uint64(FIRST % (1 << 64))),
    (np.uint64(27), np.uint64(SECOND % (1 << 64))),
    (np.uint64(31), None),
)  # shifts and factors of NumPy's
CUT = np.uint64(11)
CACHED = 1 << 15  # numbers that are made at a time, so that they stay in the cache


def keys(seeds: Sequence[int], purpose: str, agents: Sequence[int], *, device: torch.device | str = "cpu") -> Tensor:
    """Return a key for each world and agent.

    Args:
        seeds: One for each world.
        purpose: What is drawn, so that two draws of a round are independent.
        agents: Numbers of the agents.
        device: Where the keys are wanted.

    Returns:
        Integers of shape (worlds, agents).

    Example:
        >>> keys([0], "act", [0, 1])[0, 1] == keys([3, 0], "act", [1])[1, 0]
        tensor(True)
    """
    made = [[derive_seed(seed, "submodular", purpose, agent) for agent in agents] for seed in seeds]
    return torch.tensor(made, dtype=torch.int64, device=device)


def seeds_of(seed: Any) -> tuple[list[int], tuple[int, ...]]:
    """Return the seeds, and the number of worlds: none for one seed, as many as there are for several.

    Args:
        seed: A whole number, or several as a sequence, array or tensor.

    Raises:
        RecipeError: There is none, or one is no whole number.

    Example:
        >>> seeds_of(3), seeds_of([3])
        (([3], ()), ([3], (1,)))
    """
    try:
        if not getattr(seed, "ndim", 0):
            return [operator.index(seed)], ()
    except TypeError:
        pass
    try:
        found = [operator.index(part) for part in seed]
    except TypeError:
        raise RecipeError(f"seed is {seed!r}, expected a whole number, or one for each world.") from None
    if not found:
        raise RecipeError("seed is an empty list, expected a seed, or one for each world.")
    return found, (len(found),)


def several(value: Any) -> Any:
    """Return several numbers as a tuple, and a single one as it is.

    Example:
        >>> several([1, 2]), several(0.5)
        ((1.0, 2.0), 0.5)
    """
    many = isinstance(value, (list, tuple)) or getattr(value, "ndim", 0) > 0
    return tuple(float(part) for part in value) if many else value


def uniform(key: Tensor, turn: int, count: int) -> Tensor:
    """Return ``count`` numbers in [0, 1) for each key, with 53 random bits each.

    Args:
        key: Keys of :func:`keys`, any shape.
        turn: Number of the round.
        count: How many; number ``i`` does not depend on it.

    Returns:
        Float64, of the key's shape and a last dimension of ``count``.

    Example:
        >>> a, b = uniform(keys([0], "act", [0]), 5, 3), uniform(keys([0], "act", [0]), 5, 4)
        >>> bool((a == b[..., :3]).all())
        True
    """
    return rounds_of_uniform(key, turn, 1, count)[0]


def rounds_of_uniform(key: Tensor, turn: int, turns: int, count: int) -> Tensor:
    """Return the numbers of several rounds, which are cheaper to make together.

    Args:
        key: Keys of :func:`keys`, any shape.
        turn: Number of the first round.
        turns: How many rounds.
        count: How many numbers a round and key.

    Returns:
        What :func:`uniform` returns, with the rounds as a first dimension.

    Example:
        >>> key = keys([0], "act", [0])
        >>> rounds_of_uniform(key, 5, 3, 2)[1].equal(uniform(key, 6, 2))
        True
    """
    if key.device.type == "cpu":
        return torch.from_numpy(_host(key.numpy(), turn, turns, count))
    steps = torch.tensor([_wrap((turn + i) * STEP) for i in range(turns)], device=key.device)
    turned = _mix(key + steps.view(-1, *[1] * key.ndim))
    places = torch.arange(1, count + 1, device=key.device) * STEP
    bits = _mix(turned[..., None] + places)
    return bits.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).double().mul_(LEVELS)


def _host(key: NDArray[np.int64], turn: int, turns: int, count: int) -> NDArray[np.float64]:
    """Return the same numbers from NumPy, whose small operations cost a fraction of a tensor's to call."""
    first = np.uint64(turn * STEP % (1 << 64))
    steps = first + _places(turns) - _places(1) if turns > 1 else np.array([first])
    turned = _host_mix((steps[:, None] + key.reshape(-1).view(np.uint64)).reshape(-1, 1))
    out = np.empty((len(turned), count))
    rows = max(1, CACHED // max(1, count))
    for start in range(0, len(turned), rows):
        bits = _host_mix(turned[start : start + rows] + _places(count))
        bits >>= CUT
        some = out[start : start + rows]
        some[:] = bits
        some *= LEVELS
    return out.reshape(turns, *key.shape, count)


@cache
def _places(count: int) -> NDArray[np.uint64]:
    return np.arange(1, count + 1, dtype=np.uint64) * np.uint64(STEP % (1 << 64))


def _host_mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble each number in place."""
    moved = np.empty_like(z)
    for shift, factor in HOST:
        np.right_shift(z, shift, out=moved)
        z ^= moved
        if factor is not None:
            z *= factor
    return z


def _mix(z: Tensor) -> Tensor:
    """Scramble each number; the sign bit that an arithmetic shift repeats is cut off."""
    z = torch.bitwise_right_shift(z, 30).bitwise_and_((1 << 34) - 1).bitwise_xor_(z).mul_(FIRST)
    z = torch.bitwise_right_shift(z, 27).bitwise_and_((1 << 37) - 1).bitwise_xor_(z).mul_(SECOND)
    return torch.bitwise_right_shift(z, 31).bitwise_and_((1 << 33) - 1).bitwise_xor_(z)


def _wrap(number: int) -> int:
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
