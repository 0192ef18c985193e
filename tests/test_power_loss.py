"""Loss of power: a few moments of the campaign, and its control, which must find something."""

import pytest

from campaigns.power_loss import campaign, possible

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not possible(), reason="needs Linux, root and loop devices")]


def test_a_merge_survives():
    found = campaign(["merge"], 4, seed=1)
    assert found["merge"]["wrong"] == [] and found["merge"]["states"]["done"] >= 1


def test_without_waiting_for_the_disk_it_would_not():
    assert campaign(["merge"], 1, seed=1, control=True)["merge"]["wrong"]
