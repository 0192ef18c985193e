"""The ways in which a user's input can be wrong, each told in one line: what came, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

LONGEST = 4000  # letters of a message, whatever was put into it
SHOWN = 12  # names of a list in a message
KNOWN, COMPARED = 100, 2000  # of known names, those shown and those compared with a wrong one


class ModicumError(ValueError):
    """Base of every error that the user can mend; the command line prints its message and exits with 2."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class RecipeError(ModicumError):
    """A recipe or a knob is wrong: unknown key, value out of range, missing field."""


class CheckpointError(ModicumError):
    """A checkpoint, data set or model on disk cannot be used as it is."""


class InputGoneError(CheckpointError):
    """An input disappeared while it was read: once it is back, the work goes on with what is finished."""


class UnsupportedError(ModicumError):
    """The request is understood, but this combination cannot be done."""


class MemoryShortageError(ModicumError):
    """The memory of the machine or of a device ran out; the same may work with smaller batches."""


class TrainingError(ModicumError):
    """A training diverged or did nothing: there is no result that could be used."""


class MissingExtraError(ModicumError, ImportError):
    """An optional package is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} is not installed. Install it with: pip install 'modicum[{extra}]'")


def first_line(error: BaseException) -> str:
    """Return the first line of what another library's error says, or its kind when it says nothing.

    Example:
        >>> first_line(OSError("No space.\\nTry again."))
        'No space.'
    """
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    if first.endswith(":") and more:  # which announces what is wrong, and does not say it
        first = f"{first} {more[0].strip()}"
    return first.rstrip(".") + "."


def shortened(text: str, most: int = LONGEST) -> str:
    """Return a text without its middle where it is too long to be read: its end says what to do.

    It is cut between words, so that a key, which is looked for afterwards, is whole or gone.

    Example:
        >>> shortened("the fields a, b, c, d, e, f, g and h. Rename one.", most=30)
        'the fields a, … Rename one.'
    """
    if len(text) <= most:
        return text
    head, tail = text[: most // 2], text[-(most // 2 - 1) :]
    return f"{head[: head.rfind(' ') + 1]}…{tail[tail.find(' ') :] if ' ' in tail else ''}"


def listed(names: Iterable[str], most: int = SHOWN) -> str:
    """Return names in order, and how many more there are.

    Example:
        >>> listed(["b", "c", "a"], most=2)
        'a, b and 1 more'
    """
    found = sorted(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def is_text(text: str) -> bool:
    """Whether a text can be written as UTF-8: half a character, as of a file's name in another encoding, cannot.

    Example:
        >>> is_text("caf\\u00e9"), is_text("caf\\udce9")
        (True, False)
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """Return text as a terminal may get it: control characters, which could steer it, and line ends are written out.

    Example:
        >>> printable("a\\x1b[2Jb\\nc")
        'a\\\\x1b[2Jb\\\\nc'
    """
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii") for letter in text
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known name, or all of them when none is close.

    Example:
        >>> did_you_mean("tise", ["ties", "linear"])
        "Did you mean 'ties'?"
        >>> did_you_mean("DARE Linear", ["ties", "dare_linear"])
        "Did you mean 'dare_linear'?"
        >>> did_you_mean("xyz", ["ties", "linear"])
        'Known: linear, ties.'
    """
    names = sorted(known)
    # Names of a file may be any number, and each comparison takes time.
    spelled = {_spelling(known): known for known in names[:COMPARED] if len(known) < LONGEST}
    close = get_close_matches(_spelling(name[:LONGEST]), spelled, n=1)
    return f"Did you mean {spelled[close[0]]!r}?" if close else f"Known: {listed(names, most=KNOWN)}."


def _spelling(name: str) -> str:
    """Return a name without what people write differently: capitals, and the signs between words."""
    return name.casefold().replace("-", "_").replace(" ", "_")
