"""A policy as a sensor manager of Stone Soup: it chooses the actions of sensors by how well each sees each track."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any

import torch

from modicum.errors import RecipeError
from modicum.submodular.functions.facility import FacilityLocation
from modicum.submodular.policies.base import Policy

Score = Callable[[Any, Any, Any, Any], float]


class PolicyManager:
    r"""Choose sensors' actions by a policy; call ``choose_actions`` as that of Stone Soup's own sensor managers.

    .. math::
        f(A) = \sum_{\text{tracks } j} \max_{(s, a) \in A} \text{score}(s, a, j)

    Args:
        sensors: The sensors, an agent each. Anything with ``actions(timestamp)`` will do.
        policy: ``(blocks) -> policy``, given the number of actions of each sensor.
        score: ``(sensor, action, track, timestamp)`` returns how well an action would see a track, at least 0; an
            action is a tuple of one for each generator of the sensor.
        rounds: How many rounds are played on the present scores before choosing.

    Raises:
        RecipeError: There are no sensors.

    Example:
        >>> class Sensor:
        ...     def actions(self, timestamp):
        ...         return [[0, 1]]
        >>> from modicum.submodular import LastGreedy
        >>> manager = PolicyManager([Sensor(), Sensor()], LastGreedy, lambda s, a, track, t: float(a == (track,)))
        >>> [sorted(action for (action,) in found.values()) for found in manager.choose_actions({0, 1}, 0)]
        [[0, 1]]

    Cost:
        One score for each action and track, and the policy's round. Stone Soup's brute force tries all joint actions;
        its greedy manager looks at each sensor alone.
    """

    def __init__(
        self, sensors: Sequence[Any], policy: Callable[[list[int]], Policy], score: Score, *, rounds: int = 10
    ) -> None:
        if not sensors:
            raise RecipeError("sensors are empty, expected at least one.")
        self.sensors, self.score, self.rounds = list(sensors), score, rounds
        self._make = policy
        self._policy: Policy | None = None

    def choose_actions(self, tracks: Iterable[Any], timestamp: Any, nchoose: int = 1) -> list[dict[Any, Any]]:
        """Return one configuration: the actions of each sensor.

        Args:
            tracks: What is tracked.
            timestamp: The moment until which the actions are carried out.
            nchoose: Only 1 is known.

        Raises:
            RecipeError: More than one configuration is asked for, or a sensor's number of actions has changed.
        """
        if nchoose != 1:
            raise RecipeError(f"nchoose is {nchoose}: a policy chooses one configuration.")
        choices = [list(product(*sensor.actions(timestamp))) for sensor in self.sensors]
        sizes, known = [len(part) for part in choices], list(tracks)
        if self._policy is None:
            self._policy = self._make(sizes)
        if [len(block) for block in self._policy.partition.blocks] != sizes:
            before = [len(block) for block in self._policy.partition.blocks]
            raise RecipeError(f"sensors have {sizes} actions, but had {before}. Give each a fixed resolution.")
        rows = [
            [
                self.score(sensor, action, track, timestamp)
                for sensor, part in zip(self.sensors, choices)
                for action in part
            ]
            for track in known
        ]
        f = FacilityLocation(torch.tensor(rows or [[0.0] * sum(sizes)], dtype=torch.float64))
        chosen = self._policy.act(f, rounds=self.rounds)
        self._policy.update(f)
        picked = (part[max(0, int(place))] for part, place in zip(choices, chosen))
        return [dict(zip(self.sensors, picked))]
