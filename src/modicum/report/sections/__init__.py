"""What a report shows, one file for each kind of result.

A section is a function from the root of the runs to what it found there, or nothing::

    @section(order=40)
    def memory(run: RunView) -> Section | None: ...

Every module of this package is imported when a report is written, so a new section is a new file.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeAlias

from markupsafe import Markup

from modicum.borders import MALFORMED
from modicum.report.runs import RunView


@dataclass(frozen=True)
class Stat:
    """One figure for the top of the page."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page, with its share of the summary.

    Args:
        title: The heading.
        body: The content. Text that comes from a run must have entered it through ``Markup.format``, which escapes.
        findings: Sentences that answer *what came out?*
        stats: The one to three figures that matter most.
    """

    title: str
    body: Markup
    findings: tuple[str | Markup, ...] = ()
    stats: tuple[Stat, ...] = ()

    @property
    def anchor(self) -> str:
        """Name of the section in links."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower())


Draw: TypeAlias = Callable[[RunView], Section | None]

_sections: dict[str, tuple[int, Draw]] = {}


def section(*, order: int) -> Callable[[Draw], Draw]:
    """Register the decorated function; sections stand on the page by ascending ``order``."""

    def register(draw: Draw) -> Draw:
        _sections[f"{draw.__module__}.{draw.__qualname__}"] = (order, draw)
        return draw

    return register


def collect(run: RunView) -> list[Section]:
    """Return every section that has something to show."""
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        import_module(module.name)
    ordered = sorted(_sections.items(), key=lambda item: (item[1][0], item[0]))
    found = (_drawn(draw, run) for _, (_, draw) in ordered)
    return [part for part in found if part is not None]


def _drawn(draw: Draw, run: RunView) -> Section | None:
    """Return a section, or where a record holds what no run writes, that it cannot be drawn."""
    try:
        return draw(run)
    except MALFORMED as error:
        said = Markup("<p>What the runs kept of this cannot be drawn ({}).</p>").format(type(error).__name__)
        return Section(draw.__name__.replace("_", " ").capitalize(), said)
