import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modicum import errors
from modicum.credentials import SCANNED, redact
from modicum.errors import LONGEST, MissingExtraError, ModicumError, did_you_mean, first_line, listed, shortened


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
        (
            RuntimeError("Error(s) in loading:\n\tsize mismatch for w.\n\tanother."),
            "Error(s) in loading: size mismatch for w.",
        ),
    ],
)
def test_an_error_that_says_nothing_is_told_by_its_kind(error, line):
    assert first_line(error) == line


def test_nobody_else_takes_the_first_line_of_an_error():
    root = Path(errors.__file__).parent
    taken = re.compile(r'str\(error\)[^\n]*(splitlines\(\)\[0\]|partition\("\\n"\))')
    assert [path.name for path in root.rglob("*.py") if taken.search(path.read_text())] == []


@given(st.text(alphabet="ab \n", max_size=200), st.integers(10, 60))
def test_a_long_message_keeps_both_ends_and_whole_words(text, most):
    short = shortened(text, most)
    if len(text) <= most:
        assert short == text
        return
    head, tail = short.split("…")
    assert len(short) <= most
    assert text.startswith(head) and text.endswith(tail)
    assert head == "" or head.endswith(" ")
    assert tail == "" or tail.startswith(" ")


def test_no_message_is_longer_than_can_be_read_whatever_is_put_into_it():
    """Its end, which says what to do, stays; and looking for keys in it takes no seconds."""
    assert len(str(ModicumError(f"rows have {'x, ' * 10**6}. Rename one."))) <= LONGEST
    assert str(ModicumError(f"rows have {'x, ' * 10**6}. Rename one.")).endswith(" . Rename one.")
    assert len(str(MissingExtraError("x" * 10**6, "demo"))) <= LONGEST
    assert len(did_you_mean("y", map(str, range(10**6)))) < 1000
    assert did_you_mean("y" * 10**6, ["yes"]) == "Known: yes."
    assert listed([]) == ""
    assert len(redact("a1 " * 10**7)) <= SCANNED
