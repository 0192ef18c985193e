"""Processes that share a result: what a failing one leaves, and who follows whom after a launch was killed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from modicum import lock
from modicum.weights import company


@pytest.fixture
def out(tmp_path):
    (tmp_path / ".model.partial").mkdir()
    return tmp_path / "model"


def test_a_process_that_fails_leaves_nothing_in_the_result(out):
    """It may fail when the result is finished already but for its name."""
    beside = out.with_name(".model.partial")
    with company.leading(out):
        company.admit(out, beside)
        with pytest.raises(KeyError), company.following(out, beside, 1):
            company.leave(beside)
            raise KeyError("at the last moment")
        assert list(beside.iterdir()) == []
        with pytest.raises(RuntimeError, match="Process 1 of 2 ended"):
            company.wait_for_followers(lambda: False, out, beside, 2)
        company.admit(out, beside)
        company.leave(beside)
    assert {path.name for path in out.parent.iterdir()} == {".model.partial"}


def test_who_followed_a_dead_one_on_another_machine_follows_the_next(out):
    """From here a dead process of another machine looks like a living one, until somebody takes its place."""
    beside, place = out.with_name(".model.partial"), company.lock_of(out)
    me = lock._me()
    dead = replace(me, host="far", pid=1)
    place.write_text(json.dumps(asdict(dead)))
    assert dead.alive() is None
    place.write_text(json.dumps(asdict(me)))
    assert company.wait_for_leader(out, beside, dead) is False
    place.unlink()
    with pytest.raises(RuntimeError, match="The first process ended"):
        company.wait_for_leader(out, beside, dead)
    beside.rmdir()
    out.mkdir()
    assert company.wait_for_leader(out, beside, dead) is True


def test_a_follower_of_an_earlier_launch_does_not_stand_for_this_ones(out, monkeypatch):
    """Its lock, on another machine, looks like that of a living process: the first one must wait for its own follower.

    Else it would be done before the follower had come, which would then wait for it without an end.
    """
    beside = out.with_name(".model.partial")
    monkeypatch.setenv("MODICUM_STAGE_TIMEOUT", "0.1")
    (beside / "rank.1.lock").write_text(json.dumps(asdict(replace(lock._me(), host="far", pid=1))))
    (beside / "rank.1.follows").write_text("an earlier one")
    with company.leading(out):
        company.admit(out, beside)
        with pytest.raises(RuntimeError, match="did not finish"):
            company.wait_for_followers(lambda: True, out, beside, 2)
        (beside / "rank.1.lock").unlink()  # as its own machine does, where it is seen to be dead
        with company.following(out, beside, 1):
            company.wait_for_followers(lambda: True, out, beside, 2)
        company.leave(beside)
    assert list(beside.iterdir()) == []


def test_a_result_that_is_whole_by_then_needs_no_following(out):
    beside = out.with_name(".model.partial")
    beside.rmdir()
    out.mkdir()
    with company.following(out, beside, 1, again=True) as leader:
        assert leader is None
    assert {path.name for path in out.parent.iterdir()} == {"model"}
