"""Harmful requests and harmless ones beside them, from installed packages that are never imported."""

from __future__ import annotations

from collections.abc import Iterator

from modicum.errors import CheckpointError, did_you_mean
from modicum.evaluate.rows import Row
from modicum.jobs.attack_data import GOALS, goals, inputs_of, twins
from modicum.jobs.attack_data import TWINS as TWIN_FILES
from modicum.jobs.data.section import DataSection
from modicum.random import derive_seed
from modicum.registry import source

TESTED = 2  # one request in so many is for tests
TWINS = "twins"


def _files(_section: DataSection, name: str) -> Iterator[str]:
    """Yield what is read of installed packages, with its version and SHA-256."""
    for each in name.split("+"):
        yield from inputs_of(TWIN_FILES if each == TWINS else GOALS.get(each, ()))


@source("requests", inputs=_files)
def requests(section: DataSection, name: str) -> list[Row]:
    """Return requests with what is known of them: ``requests:twins``, or sets such as ``strongreject+benign_edgy``.

    ``twins`` holds harmful requests and harmless ones of the same form in turn, so that a part of it holds both. Of
    several sets the rows come in turn, too.

    Args:
        section: ``split`` is read: half of the requests are for tests.
        name: ``twins``, or names of sets of :func:`modicum.jobs.attack_data.goals` joined by ``+``.

    Raises:
        CheckpointError: There is no such set, or its package is not installed.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> requests(DataSection(path="requests:none"), "none")
        Traceback (most recent call last):
        ...
        modicum.errors.CheckpointError: There is no set of requests 'none'. ...

    Cost:
        Packaged files are read once.
    """
    found: list[list[Row]] = []
    for each in name.split("+"):
        if each == TWINS:
            found += [[{"prompt": goal.text, "harmful": goal.harmful} for goal in pair] for pair in twins()]
        elif each in GOALS:
            found += [[{"prompt": goal.text, "harmful": goal.harmful}] for goal in goals(each)]
        else:
            raise CheckpointError(f"There is no set of requests {each!r}. {did_you_mean(each, [TWINS, *GOALS])}")
    testing = section.split != "train"
    kept = [rows for rows in found if (derive_seed(0, "requests", rows[0]["prompt"]) % TESTED == 0) == testing]
    groups = [[row for rows in kept for row in rows if row["harmful"] is harmful] for harmful in (True, False)]
    if "+" not in name:
        return [row for rows in kept for row in rows]
    mixed = [row for pair in zip(*groups) for row in pair]
    return mixed + max(groups, key=len)[len(mixed) // 2 :]
