"""Every path of every recipe, and in its place every kind of thing: some pairs of the campaign, or all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and looks at /proc")


def campaign(*arguments: str) -> None:
    """Run it in a process without threads, whose copies are whole."""
    script = Path(__file__).parent / "campaigns" / "places.py"
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-1000:]


def test_some_pairs_work_or_are_refused_in_one_line():
    campaign("--sample", "30")


@pytest.mark.slow
def test_all_pairs_work_or_are_refused_in_one_line():
    campaign("--only", ":", "--seconds", "20000")
