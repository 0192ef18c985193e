"""The guide's example of an objective of one's own does what the guide says."""

import doctest
from pathlib import Path


def test_the_example_of_the_guide():
    page = Path(__file__).parents[2] / "docs" / "guide" / "coordinate.md"
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted >= 7 and not found.failed
