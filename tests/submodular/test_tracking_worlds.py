"""Moving targets: what a world does in a round, tracks of files, and worlds of a batch."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from modicum.errors import ModicumError
from modicum.submodular import MASPL, LastGreedy, OracleGreedy, Random, complete, metropolis_weights, simulate
from modicum.submodular.tracking import TrackingWorld
from modicum.submodular.tracks import from_stone_soup, read_tracks, stone_soup_tracks


def test_the_objective_counts_the_nearest_agent_after_the_moves():
    world = TrackingWorld(3, 4, seed=1)
    actions = torch.tensor([0, 7, 20])
    moved = world.positions[0] + world.moves[actions]
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    moved = moved * np.minimum(1, world.radius / length)
    gaps = np.linalg.norm(world.target_positions[0].numpy()[:, None] - moved.numpy(), axis=-1).min(1)
    f, n = world.objective(), sum(world.blocks)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[torch.arange(3) * 24 + actions] = True
    assert float(f.value(mask)) == pytest.approx((1 / (gaps + 1)).mean(), abs=1e-12)
    world.step(actions)
    np.testing.assert_allclose(world.positions[0], moved, atol=1e-12)


def test_everybody_stays_in_the_disk_and_targets_keep_their_speeds():
    world = TrackingWorld(4, 12, mixture=(1, 1, 1), seed=[0, 1])
    policy = Random(world.blocks, seed=[0, 1])
    assert world.kind.bincount().tolist() == [4, 4, 4]
    for _ in range(60):
        before = world.target_positions
        world.step(policy.act())
        paces = (world.target_positions - before).norm(dim=-1) / world.dt
        assert float(paces.max()) <= 15 + 1e-9
        assert float(world.target_positions.norm(dim=-1).max()) <= 20 + 1e-9
        assert float(world.positions.norm(dim=-1).max()) <= 20 + 1e-9
    assert world.distances().shape == world.watchers().shape == (2, 12)


def test_a_frightened_target_flees_straight_away():
    world = TrackingWorld(1, 1, mixture=(0, 1, 0), seed=0)
    world.positions = torch.zeros(1, 1, 2, dtype=torch.float64)
    world.target_positions = torch.tensor([[[0.6, 0.8]]], dtype=torch.float64)
    world._move_targets()
    moved = world.target_positions[0, 0] - torch.tensor([0.6, 0.8])
    np.testing.assert_allclose(moved, 15 * 0.04 * np.array([0.6, 0.8]), atol=1e-12)


def test_a_world_of_a_batch_goes_as_it_would_alone():
    def play(seeds):
        world = TrackingWorld(3, 5, seed=seeds)
        policy = MASPL(world.blocks, metropolis_weights(complete(3)), eta=30.0, seed=seeds)
        return simulate(policy, world, rounds=12, hints=True, hint_rounds=2)

    both, alone = play([3, 8]), play(8)
    assert torch.equal(both.actions[:, 1], alone.actions)
    torch.testing.assert_close(both.utility[:, 1], alone.utility, rtol=0, atol=1e-12)


def test_who_sees_more_does_better():
    utility = {}
    for name, policy, hints in (
        ("oracle", OracleGreedy, None),
        ("predicted", LastGreedy, True),
        ("last", LastGreedy, None),
        ("random", Random, None),
    ):
        world = TrackingWorld(8, 12, seed=[0, 1])
        trace = simulate(policy(world.blocks, seed=[0, 1]), world, rounds=80, hints=hints, optimum="greedy")
        utility[name] = float(trace.utility.mean())
        assert trace.optimum_kind == "greedy" and bool((trace.ratio() <= 1.05).all())
    assert utility["oracle"] > utility["predicted"] > utility["last"] > 1.5 * utility["random"]


AIS = """MMSI,Time,lat,lon,SOG
1,2026-01-01T00:00:00,50.0,0.0,1
1,2026-01-01T00:00:40,50.0,0.001,1
2,2026-01-01T00:00:10,50.001,0.0,1
2,2026-01-01T00:00:30,50.003,0.0,1
"""


def test_tracks_of_latitude_and_longitude_become_metres(tmp_path):
    (tmp_path / "ais.csv").write_text(AIS)
    tracks = read_tracks(tmp_path / "ais.csv", step=10)
    assert tracks.shape == (3, 2, 2)
    degree = np.pi / 180 * 6_371_008.8
    np.testing.assert_allclose(tracks[1, 1] - tracks[0, 1], [0, 0.001 * degree], atol=1e-6)
    np.testing.assert_allclose(
        tracks[1, 0] - tracks[0, 0], [0.00025 * degree * np.cos(np.radians(50.001)), 0], atol=1e-6
    )
    fitted = read_tracks(tmp_path / "ais.csv", step=10, fit=20.0)
    assert float(fitted.norm(dim=-1).max()) == pytest.approx(20)
    world = TrackingWorld(2, tracks=fitted, seed=0)
    assert world.targets == 2 and simulate(Random(world.blocks), world, rounds=2).utility.shape == (2,)
    with pytest.raises(ModicumError, match="the tracks have 3 rounds, expected more"):
        simulate(Random(world.blocks), world, rounds=5)


FLAT = "time,id,x,y\n0,a,0,0\n10,a,1,1\n20,a,2,2\n0,b,1,0\n20,b,1,2\n"
BAD = {
    "no such file": (None, {}, "Cannot read"),
    "no reports": ("time,id,x,y\n", {}, "expected a header and reports"),
    "no time": ("when,id,x,y\n0,a,0,0\n", {}, "has no column 'time'"),
    "no identity": ("time,x,y\n0,0,0\n", {}, "has no column 'id' (or mmsi, icao24"),
    "no places": ("time,id,x\n0,a,0\n", {}, "has no column 'lat'"),
    "a word for a number": ("time,id,x,y\n0,a,east,0\n", {}, "line 2: x is 'east', expected a number"),
    "a word for a time": ("time,id,x,y\nnoon,a,0,0\n", {}, "line 2: time is 'noon'"),
    "no time of day": ("time,id,x,y\n0,a,0,0\nnan,a,5,5\n", {}, "line 3: time is 'nan'"),
    "an endless time": ("time,id,x,y\n0,a,0,0\ninf,a,5,5\n", {}, "line 3: time is 'inf'"),
    "a gap around all rounds": (
        "time,id,x,y\n0,a,0,0\n10000,a,9,9\n",
        {"start": 4000, "duration": 500, "step": 100},
        "track a has a gap of 10000 s after 0 s",
    ),
    "nothing left": (FLAT, {"start": 0, "duration": 30, "incomplete": "leave_out"}, "none of 2 tracks is complete"),
    "a short line": ("time,id,x,y\n0,a,0\n", {}, "line 2: 3 values for 4 columns"),
    "a gap": (FLAT, {"max_gap": 15}, "track b has a gap of 20 s after 0 s, expected at most 15 s"),
    "tracks apart": ("time,id,x,y\n0,a,0,0\n1,a,0,0\n5,b,0,0\n6,b,0,0\n", {}, "track a ends before track b begins"),
    "beyond a track": (FLAT, {"start": 0, "duration": 30}, "track a covers 0 s to 20 s, expected 0 s to 30 s"),
    "a step of nothing": (FLAT, {"step": 0}, "step is 0"),
}


def test_tracks_that_are_not_complete_may_be_left_out(tmp_path):
    (tmp_path / "tracks.csv").write_text(FLAT + "20,c,5,5\n30,c,6,6\n")
    found = read_tracks(tmp_path / "tracks.csv", start=0, duration=20, max_gap=15, incomplete="leave_out")
    assert found[:, 0].tolist() == [[0, 0], [1, 1], [2, 2]] and found.shape[1] == 1


def test_the_date_line_is_no_wall(tmp_path):
    (tmp_path / "tracks.csv").write_text("time,id,lat,lon\n0,a,0,179.99\n10,a,0,-179.99\n")
    east = read_tracks(tmp_path / "tracks.csv", step=5)[:, 0, 0]
    np.testing.assert_allclose(east, np.array([-0.01, 0, 0.01]) * np.pi / 180 * 6_371_008.8, atol=1e-6)


def test_times_without_a_zone_are_utc(tmp_path, monkeypatch):
    # In Berlin's clock two hours become one in this night.
    (tmp_path / "tracks.csv").write_text("time,id,x,y\n2026-03-29T01:30:00,a,0,0\n2026-03-29T03:30:00,a,2,0\n")
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        found = read_tracks(tmp_path / "tracks.csv", step=3600, max_gap=1e4)
    finally:
        monkeypatch.undo()
        time.tzset()
    assert found[:, 0, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("what", BAD)
def test_bad_tracks_are_named_in_one_line(what, tmp_path):
    text, knobs, message = BAD[what]
    if text is not None:
        (tmp_path / "tracks.csv").write_text(text)
    with pytest.raises(ModicumError, match=re.escape(message)) as caught:
        read_tracks(tmp_path / "tracks.csv", **knobs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"agents": 0}, "agents is 0"),
        ({"mixture": (1, -1, 0)}, "mixture is (1, -1, 0)"),
        ({"mixture": (0, 0, 0)}, "mixture is (0, 0, 0)"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"radius": -1}, "radius is -1"),
        ({"speeds": ()}, "speeds is ()"),
        ({"preset": "sea"}, "preset is 'sea'"),
        ({"tracks": np.zeros((3, 2))}, "tracks have shape (3, 2)"),
        ({"tracks": [[[np.nan, 0]]]}, "target 0 has a gap"),
    ],
)
def test_bad_scenes_are_named(knobs, message):
    with pytest.raises(ModicumError, match=re.escape(message)):
        TrackingWorld(**{"agents": 2, "targets": 3} | knobs)


def test_the_preset_of_osg():
    world = TrackingWorld(2, 2, preset="osg", seed=0)
    assert world.blocks == [13, 13] and world.epsilon == 1e-3 and not world.moves[0].any()


def test_tracks_of_stone_soup_repeat():
    pytest.importorskip("stonesoup")
    one, other = (stone_soup_tracks(3, 6, seed=2, fit=20.0) for _ in range(2))
    assert (
        torch.equal(one, other)
        and one.shape[1:] == (3, 2)
        and not torch.equal(one, stone_soup_tracks(3, 6, seed=3, fit=20.0))
    )
    with pytest.raises(ModicumError, match="expected as many in each"):
        from_stone_soup([])
