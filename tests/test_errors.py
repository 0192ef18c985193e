import re
from pathlib import Path

import pytest

from modicum import errors
from modicum.errors import MissingExtraError, ModicumError, did_you_mean, first_line


def test_a_close_name_is_suggested_and_otherwise_all_are_listed():
    assert did_you_mean("densty", ["density", "scale"]) == "Did you mean 'density'?"
    assert did_you_mean("qqq", ["density", "scale"]) == "Known: density, scale."


def test_a_missing_extra_names_the_install_command():
    error = MissingExtraError("gguf", "demo")
    assert isinstance(error, ModicumError) and isinstance(error, ImportError)
    assert "pip install 'modicum[demo]'" in str(error)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError("No space.\nTry again."), "No space."),
        (ValueError("\n  wrong  \n"), "wrong."),
        (AssertionError(), "AssertionError."),
        (RuntimeError(" \n"), "RuntimeError."),
    ],
)
def test_an_error_that_says_nothing_is_told_by_its_kind(error, line):
    assert first_line(error) == line


def test_nobody_else_takes_the_first_line_of_an_error():
    root = Path(errors.__file__).parent
    taken = re.compile(r'str\(error\)[^\n]*(splitlines\(\)\[0\]|partition\("\\n"\))')
    assert [path.name for path in root.rglob("*.py") if taken.search(path.read_text())] == []
