"""Counts of campaigns that run at one time, and go on later."""

import json
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="campaigns fork")


def test_runs_at_one_time_keep_each_others_counts(tmp_path):
    from campaigns.tally import Tally

    path = tmp_path / "x.json"
    one, two = Tally(path, 1), Tally(path, 2)
    one.add("refused", 0.1, 0, None)
    two.add("read", 0.1, 0, None)
    two.add("read", 0.1, 1, "a traceback")
    two.write()
    one.write()
    two.add("read", 0.1, 2, None)
    two.write()
    found = json.loads(path.read_text())
    assert found["total"] == 4 and found["ends"] == {"refused": 1, "read": 2, "wrong": 1}
    assert Tally(path, 2).done == 3 and found["seeds"]["2"]["wrong"] == ["a traceback"]
