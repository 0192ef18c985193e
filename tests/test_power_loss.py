"""Loss of power: a few moments of the campaign, and its control, which must find something."""

import subprocess
import sys
from pathlib import Path

import pytest

from campaigns.power_loss import possible

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not possible(), reason="needs Linux, root and loop devices")]


def campaign(*arguments: str) -> None:
    """Run it in a process without threads, whose copies are whole."""
    script = Path(__file__).parent / "campaigns" / "power_loss.py"
    command = [sys.executable, script, "--trial", "--jobs", "merge", "--seed", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]


def test_a_merge_survives():
    campaign("--moments", "4")


def test_without_waiting_for_the_disk_it_would_not():
    campaign("--moments", "1", "--control")
