r"""Agents that follow moving targets: a world whose objective is how closely every target is watched.

Agents and targets live in a disk. In each round every agent chooses one of its moves (directions × speeds), the
objective being :math:`f(A) = \sum_j 1 / (d_j + \varepsilon)` with :math:`d_j` the distance of target ``j`` from the
nearest agent after the moves: facility location. Worlds are batched; all draws are named by seed, target and round.

The scene follows the description in the publications; what they do not state (size, speeds, time step, objective) is
our choice, all of it adjustable. The preset ``osg`` has the objective and moves of OSG's authors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.submodular.draws import keys, seeds_of, uniform
from modicum.submodular.functions.facility import FacilityLocation
from modicum.types import NonNegative, Positive, PositiveInt

KINDS = ("random", "evading", "polyline")
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "disk": {"directions": 8, "speeds": (5.0, 10.0, 15.0), "epsilon": 1.0, "rest": False},
        "osg": {"directions": 4, "speeds": (1.0, 2.0, 3.0), "epsilon": 1e-3, "rest": True},
    }
)


@guarded
class TrackingWorld:
    """Agents and targets in a disk, for several worlds at once.

    Args:
        agents: Number of agents.
        targets: Number of targets; that of the tracks where these are given.
        mixture: Shares of targets that turn at random every step, that flee from agents, and that keep a course.
        seed: Seed of all draws; several for as many worlds.
        preset: ``disk`` or ``osg``: the moves and the objective, which the next four may change.
        directions: Number of directions of a move.
        speeds: Speeds of a move, in units of length a second.
        rest: Agents may stay where they are.
        epsilon: Added to the distance; the smaller, the more the nearest target counts.
        radius: Radius of the disk.
        dt: Seconds of a round.
        target_speed: Slowest and fastest target.
        course: Fewest and most rounds of one course.
        flee_within: Distance at which a fleeing target takes fright.
        flee_speed: Speed of its flight.
        flee_seconds: How long it flees.
        scaled: Divide the objective by the number of targets, so that it is at most 1/epsilon.
        tracks: Positions of targets for every round, (rounds, targets, 2), in place of simulated ones; see
            :mod:`modicum.submodular.tracks`.

    Attributes:
        blocks: Sizes of the agents' blocks, for a policy.
        round: Number of the present round.
        rounds: How many there can be, where tracks end.

    Raises:
        RecipeError: A knob is out of range.

    Example:
        >>> from modicum.submodular import MASPL, metropolis_weights, ring, simulate
        >>> world = TrackingWorld(4, 6, seed=0)
        >>> policy = MASPL(world.blocks, metropolis_weights(ring(4)), eta=30.0)
        >>> simulate(policy, world, rounds=5).utility.shape
        torch.Size([5])
    """

    def __init__(
        self,
        agents: PositiveInt = 20,
        targets: PositiveInt = 30,
        *,
        mixture: Sequence[NonNegative] = (8, 1, 1),
        seed: int | Sequence[int] = 0,
        preset: Literal["disk", "osg"] = "disk",
        directions: PositiveInt | None = None,
        speeds: Sequence[Positive] | None = None,
        rest: bool | None = None,
        epsilon: Positive | None = None,
        radius: Positive = 20.0,
        dt: Positive = 0.04,
        target_speed: tuple[NonNegative, NonNegative] = (5.0, 10.0),
        course: tuple[PositiveInt, PositiveInt] = (50, 200),
        flee_within: NonNegative = 1.5,
        flee_speed: NonNegative = 15.0,
        flee_seconds: NonNegative = 1.0,
        scaled: bool = True,
        tracks: Any = None,
    ) -> None:
        if preset not in PRESETS:
            raise RecipeError(f"preset is {preset!r}, expected {' or '.join(PRESETS)}.")
        chosen = {"directions": directions, "speeds": speeds, "rest": rest, "epsilon": epsilon}
        known = {**PRESETS[preset], **{name: value for name, value in chosen.items() if value is not None}}
        self.tracks = None if tracks is None else _read(tracks)
        self.agents, self.targets = agents, targets if self.tracks is None else self.tracks.shape[1]
        self.epsilon, self.radius, self.dt = float(known["epsilon"]), radius, dt
        shares = np.asarray(mixture, float)
        for name, ok, expected in (
            ("targets", self.targets >= 1, "at least 1"),
            (
                "mixture",
                shares.shape == (3,) and (shares >= 0).all() and shares.sum() > 0,
                "three shares of at least 0",
            ),
            ("speeds", bool(known["speeds"]), "one speed or more"),
            ("target_speed", target_speed[0] <= target_speed[1], "two speeds in order"),
            ("course", course[0] <= course[1], "two numbers of rounds in order"),
        ):
            if not ok:
                given = {"agents": agents, "targets": targets, "mixture": mixture, "radius": radius, "dt": dt,
                         "target_speed": target_speed, "course": course, **known}[name]  # fmt: skip
                raise RecipeError(f"tracking: {name} is {given}, expected {expected}.")
        self._target_speed, self._course = target_speed, course
        self._flee = (flee_within, flee_speed, max(1, round(flee_seconds / dt)))
        self.rounds = None if self.tracks is None else len(self.tracks) - 1
        self.scale = 1 / self.targets if scaled else 1.0
        self.moves = _moves(known["directions"], known["speeds"], rest=known["rest"]) * dt
        self.blocks = [len(self.moves)] * agents
        self.seeds, self.worlds = seeds_of(seed)
        self.kind = _kinds(self.targets, shares)
        self._keys = {
            name: keys(self.seeds, f"tracking-{name}", range(count))
            for name, count in (("agent", agents), ("target", self.targets))
        }
        self._begin()

    def _begin(self) -> None:
        self.round = 0
        self.positions = self._in_disk(uniform(self._keys["agent"], 0, 2))
        draws = uniform(self._keys["target"], 0, 5)
        self._heading = 2 * math.pi * draws[..., 2]
        low, high = self._target_speed
        self._speed = low + (high - low) * draws[..., 3]
        self._left = self._rounds_of(draws[..., 4])
        self._fright = torch.zeros_like(self._left)
        self.seen = self._in_disk(draws) if self.tracks is None else self._tracked(0)
        self.target_positions = self.seen
        self._move_targets()

    def _in_disk(self, draws: Tensor) -> Tensor:
        """Spread points evenly over the disk."""
        distance, angle = self.radius * draws[..., 0].sqrt(), 2 * math.pi * draws[..., 1]
        return torch.stack([distance * angle.cos(), distance * angle.sin()], -1)

    def _rounds_of(self, draws: Tensor) -> Tensor:
        low, high = self._course
        return (low + (high - low + 1) * draws).long()

    # -- the world of a simulation -------------------------------------------------------------------------------

    def objective(self) -> FacilityLocation:
        """Return the objective of this round: targets where they are now, agents after any of their moves."""
        return self._at(self.target_positions)

    def predict(self) -> FacilityLocation:
        """Return what can be known before acting: targets where they were seen last."""
        return self._at(self.seen)

    def step(self, actions: Tensor) -> None:
        """Move the agents by their actions (an agent of action -1 stays), and then the targets."""
        chosen = self.moves[actions.clamp(min=0)] * (actions >= 0)[..., None]
        self.positions = self._inside(self.positions + chosen.reshape(self.positions.shape))
        self.round += 1
        self._move_targets()

    def distances(self) -> Tensor:
        """Return how far each target is from the nearest agent, (worlds, targets)."""
        return self._out(torch.cdist(self.target_positions, self.positions).amin(-1))

    def watchers(self) -> Tensor:
        """Return the nearest agent of each target, (worlds, targets)."""
        return self._out(torch.cdist(self.target_positions, self.positions).argmin(-1))

    # -- motion --------------------------------------------------------------------------------------------------

    def _at(self, targets: Tensor) -> FacilityLocation:
        candidates = self._inside(self.positions[:, :, None] + self.moves).flatten(1, 2)
        values = self.scale / (torch.cdist(targets, candidates) + self.epsilon)
        return FacilityLocation(self._out(values))

    def _out(self, values: Tensor) -> Tensor:
        return values if self.worlds else values[0]

    def _inside(self, points: Tensor) -> Tensor:
        length = points.norm(dim=-1, keepdim=True)
        return points * (self.radius / length.clamp(min=self.radius))

    def _move_targets(self) -> None:
        self.seen = self.target_positions
        if self.tracks is not None:
            self.target_positions = self._tracked(self.round)
            return
        draws = uniform(self._keys["target"], self.round + 1, 3)
        fresh = 2 * math.pi * draws[..., 0]
        turns = (self.kind == 0) | (self._left <= 0)
        self._heading = torch.where(turns, fresh, self._heading)
        self._left = torch.where(turns, self._rounds_of(draws[..., 1]), self._left - 1)
        within, speed, rounds = self._flee
        gaps = self.target_positions[:, :, None] - self.positions[:, None]
        nearest, whose = gaps.norm(dim=-1).min(-1)
        scared = (self.kind == 1) & (nearest < within) & (self._fright <= 0)
        away = gaps.gather(2, whose[..., None, None].expand(-1, -1, 1, 2))[:, :, 0]
        self._heading = torch.where(scared, torch.atan2(away[..., 1], away[..., 0]), self._heading)
        self._fright = torch.where(scared, rounds, self._fright - 1).clamp_(min=0)
        fleeing = self._fright > 0
        pace = torch.where(fleeing, speed, self._speed) * self.dt
        course = torch.stack([self._heading.cos(), self._heading.sin()], -1)
        moved = self.target_positions + pace[..., None] * course
        outside = moved.norm(dim=-1) > self.radius
        # At the edge a target turns back inwards, somewhat to one side.
        inwards = torch.atan2(-moved[..., 1], -moved[..., 0]) + (draws[..., 2] - 0.5) * math.pi / 2
        self._heading = torch.where(outside, inwards, self._heading)
        self.target_positions = self._inside(moved)

    def _tracked(self, number: int) -> Tensor:
        if self.tracks is None or number >= len(self.tracks):
            count = 0 if self.tracks is None else len(self.tracks)
            raise RecipeError(f"the tracks have {count} rounds, expected more: lower rounds to {max(0, count - 1)}.")
        return self.tracks[number].expand(len(self.seeds), -1, -1)


def _moves(directions: int, speeds: Sequence[float], *, rest: bool) -> Tensor:
    angles = torch.arange(directions, dtype=torch.float64) * (2 * math.pi / directions)
    compass = torch.stack([angles.cos(), angles.sin()], -1)
    moves = torch.cat([speed * compass for speed in speeds])
    return torch.cat([torch.zeros(1, 2, dtype=torch.float64), moves]) if rest else moves


def _kinds(targets: int, shares: Any) -> Tensor:
    """Share targets out over the kinds, as evenly as whole numbers allow."""
    bounds = np.round(np.cumsum(shares) / shares.sum() * targets).astype(int)
    counts = np.diff(np.concatenate([[0], bounds]))
    return torch.repeat_interleave(torch.arange(3), torch.from_numpy(counts))


def _read(tracks: Any) -> Tensor:
    found = torch.as_tensor(np.asarray(tracks)).double()
    if found.ndim != 3 or found.shape[-1] != 2 or 0 in found.shape:
        raise RecipeError(f"tracks have shape {tuple(found.shape)}, expected (rounds, targets, 2).")
    if not bool(found.isfinite().all()):
        number, target, _ = (int(i) for i in (~found.isfinite()).nonzero()[0])
        raise RecipeError(f"tracks[{number}, {target}] is no finite position: target {target} has a gap.")
    return found
