"""Policies as sensor managers of Stone Soup."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import numpy as np
import pytest

from modicum.errors import ModicumError
from modicum.submodular import MASPL, complete, metropolis_weights
from modicum.submodular.stone_soup import PolicyManager

NOW = datetime(2026, 1, 1)
WIDTH = math.radians(30)


def spl(blocks):
    return MASPL(blocks, metropolis_weights(complete(len(blocks))), eta=30.0, seed=0)


def test_two_real_radars_look_at_different_tracks():
    radar = pytest.importorskip("stonesoup.sensor.radar")
    angle = pytest.importorskip("stonesoup.types.angle")

    def sensor():
        made = radar.RadarRotatingBearingRange(
            position_mapping=(0, 2), noise_covar=np.diag([0.1, 1]), ndim_state=4, position=np.array([[0], [0]]), rpm=60,
            fov_angle=WIDTH, dwell_centre=np.array([[0.0]]), max_range=np.inf, resolution=angle.Angle(WIDTH),
        )  # fmt: skip
        made.timestamp = NOW
        return made

    def sees(_, action, bearing, __):
        off = abs((float(action[0].target_value) - bearing + math.pi) % (2 * math.pi) - math.pi)
        return 1.0 if off <= WIDTH / 2 else 0.0

    sensors = [sensor(), sensor()]
    manager = PolicyManager(sensors, spl, sees, rounds=20)
    tracks = {0.1, 2.0}
    for second in range(1, 4):
        (found,) = manager.choose_actions(tracks, NOW + timedelta(seconds=1))
        assert set(found) == set(sensors), second
    assert sum(max(sees(None, action, track, None) for action in found.values()) for track in tracks) == 2.0
    for one, (action,) in found.items():
        one.add_actions([action])
        one.act(NOW + timedelta(seconds=1))


class Sensor:
    def __init__(self, count):
        self.count = count

    def actions(self, timestamp):
        return [range(self.count)]


def test_what_a_manager_refuses():
    with pytest.raises(ModicumError, match="sensors are empty"):
        PolicyManager([], spl, lambda *_: 0.0)
    manager = PolicyManager([Sensor(2), Sensor(3)], spl, lambda sensor, action, track, _: float(action[0] == track))
    assert len(manager.choose_actions(set(), NOW)[0]) == 2
    with pytest.raises(ModicumError, match="nchoose is 2"):
        manager.choose_actions({1}, NOW, nchoose=2)
    manager.sensors[0].count = 4
    with pytest.raises(ModicumError, match=r"have \[4, 3\] actions, but had \[2, 3\]"):
        manager.choose_actions({1}, NOW)
