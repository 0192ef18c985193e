"""Regular expressions that come from recipes and files: whatever they are, matching takes bounded time.

A pattern such as ``(a+)+$`` takes years of Python's engine on thirty letters. :class:`Pattern` matches with the package
``regex``, which gives up after :data:`SECONDS`. What another library is going to match with Python's engine is tried
here on the same names first (:func:`try_pattern`).
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import FrameType
from typing import Any

from modicum.errors import RecipeError, first_line

SECONDS = 1.0  # that one match may take
TOTAL = 2.0  # of the processor's seconds that all matches of one expression may take
LONGEST = 10_000  # letters of a pattern
MOST = 100_000  # copies that counts inside counts, such as (a{100}){100}, may stand for


class Pattern:
    """A regular expression in Python's syntax, whose matches take bounded time: each of them, and all together.

    Args:
        pattern: The expression.
        what: What it is for, for errors, such as the key of a recipe.

    Raises:
        RecipeError: It is malformed, or beyond all measure.

    Example:
        >>> Pattern("lm_head|embed", "exclude").finds("model.embed_tokens.weight")
        True
        >>> Pattern("(a", "exclude")
        Traceback (most recent call last):
            ...
        modicum.errors.RecipeError: exclude '(a' is no regular expression: missing ) at position 2. Correct it.
    """

    def __init__(self, pattern: str, what: str) -> None:
        self.pattern, self.what = pattern, what
        self._compiled = _compiled(pattern, what)
        self._left = TOTAL

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self._compiled.groups)

    def finds(self, text: str) -> bool:
        """Whether the expression matches somewhere in a text."""
        with self._bounded(text):
            return self._compiled.search(text, timeout=SECONDS) is not None

    def begins(self, text: str) -> bool:
        """Whether the expression matches at the beginning of a text."""
        with self._bounded(text):
            return self._compiled.match(text, timeout=SECONDS) is not None

    def first_group(self, text: str) -> str | None:
        """Return what the last group holds where the expression matches at the beginning of a text."""
        with self._bounded(text):
            found = self._compiled.match(text, timeout=SECONDS)
            return None if found is None else str(found[found.re.groups])

    def all_in(self, text: str) -> list[Any]:
        """Return all matches in a text, as ``re.findall`` does."""
        with self._bounded(text):
            found: list[Any] = self._compiled.findall(text, timeout=SECONDS)
            return found

    def replaced(self, replacement: str, text: str) -> str:
        """Return a text with every match replaced, as ``re.sub`` does."""
        with self._bounded(text):
            try:
                return str(self._compiled.sub(replacement, text, timeout=SECONDS))
            except (_error(), IndexError) as error:
                told = first_line(error).rstrip(".")
                raise RecipeError(
                    f"{self.what} {_short(self.pattern)} → {replacement!r}: {told}. Correct it."
                ) from None

    @contextmanager
    def _bounded(self, text: str) -> Iterator[None]:
        began = time.thread_time()
        try:
            yield
        except (TimeoutError, MemoryError, RecursionError):
            raise _slow(self.pattern, self.what, text) from None
        self._left -= time.thread_time() - began
        if self._left < 0:
            raise _slow(self.pattern, self.what, text, TOTAL)


def alternatives(pattern: str) -> list[str]:
    """Return the alternatives of an expression that stand outside all groups, one of which a text must match.

    Example:
        >>> alternatives(r"embed_tokens|h\\.(0|1)\\.|[|]|a\\|b")
        ['embed_tokens', 'h\\\\.(0|1)\\\\.', '[|]', 'a\\\\|b']
    """
    found, depth, listed, place = [""], 0, False, 0
    while place < len(pattern):
        letter = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(letter)
        if listed:
            listed = letter != "]"
        elif letter == "[":
            listed = True
        elif letter in ("(", ")"):
            depth += 1 if letter == "(" else -1
        if letter == "|" and not depth and not listed:
            found.append("")
        else:
            found[-1] += letter
    return found


def try_pattern(pattern: str, names: Iterable[str], what: str, *, around: str = "{}") -> None:
    """Match names with Python's own engine once, as another library is going to do, but in bounded time.

    Args:
        pattern: The expression.
        names: What it will be matched with.
        what: What it is for, for errors.
        around: How the library surrounds the pattern, which stands for ``{}``.

    Raises:
        RecipeError: It is malformed, or takes longer than :data:`SECONDS`.
    """
    _compiled(pattern, what)
    try:
        expression = re.compile(around.replace("{}", pattern))
    except (re.error, OverflowError, RecursionError) as error:
        told = first_line(error).rstrip(".")
        raise RecipeError(f"{what} {_short(pattern)} is no regular expression: {told}. Correct it.") from None
    slow = _slow(pattern, what, max(names := list(names), key=len, default=""))
    with _alarm(slow):
        for name in names:
            expression.match(name)


@contextmanager
def _alarm(error: Exception) -> Iterator[None]:
    """Raise an error once the time is over: Python's engine looks at signals now and then, in the main thread."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def ring(_number: int, _frame: FrameType | None) -> None:
        raise error

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@lru_cache(maxsize=256)
def _compiled(pattern: str, what: str) -> Any:
    import regex  # type: ignore[import-untyped]

    if len(pattern) > LONGEST:
        raise RecipeError(f"{what} has {len(pattern)} letters, expected a regular expression of at most {LONGEST}.")
    copies = 1
    for count in re.findall(r"\{(?:\d*,)?(\d+),?\}", pattern):
        copies *= max(1, int(count[:10]))
    if copies > MOST:
        raise RecipeError(f"{what} {_short(pattern)} repeats more than {MOST} times. Write smaller counts.")
    try:
        return regex.compile(pattern)
    except (regex.error, OverflowError, RecursionError, ValueError, TypeError) as error:
        told = first_line(error).rstrip(".")
        raise RecipeError(f"{what} {_short(pattern)} is no regular expression: {told}. Correct it.") from None


def _error() -> type[Exception]:
    import regex

    found: type[Exception] = regex.error
    return found


def _slow(pattern: str, what: str, text: str, seconds: float | None = None) -> RecipeError:
    took = f"takes more than {SECONDS:g} s on {len(text)} letters"
    if seconds is not None:
        took = f"takes more than {seconds:g} s on all texts together"
    return RecipeError(f"{what} {_short(pattern)} {took}. Write it without repeats inside repeats.")


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
