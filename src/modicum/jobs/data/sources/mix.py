"""Several sections of data as one: ``data: {mix: …}``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from modicum.errors import RecipeError
from modicum.evaluate.rows import Rows
from modicum.jobs.data.section import DataSection
from modicum.registry import source


def _parts(section: DataSection, _name: str) -> Iterator[str]:
    """Yield what the parts and the scorer read."""
    if section.mix is not None:
        yield from section.mix.inputs(section)


@source("mix", inputs=_parts)
def mix(section: DataSection, _name: str, *, seed: int = 0, note: Callable[[str], None] | None = None) -> Rows:
    """Return the rows of several dimensions, drawn by ratios without replacement and shuffled.

    Args:
        section: ``mix`` and ``size`` are read; its parts have the section's split and lengths where they name none.
        seed: Names the draws.
        note: Told how many rows each part gives, and what a filter left of it.

    Raises:
        ModicumError: A part has too few rows, or a scorer fails.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> parts = {"helpful": "task:instructions", "honest": "task:unanswerable"}
        >>> section = DataSection.model_validate({"mix": {**parts, "ratios": [3, 1]}, "size": 8})
        >>> [row["dimension"] for row in mix(section, "").rows].count("helpful")
        6

    Cost:
        That of its parts; a filter by a model reads every answer once, and remembers what it found.
    """
    from modicum.jobs.data.mixture import mixed_rows

    if section.mix is None:
        raise RecipeError(f"{section.path} names no parts. Set mix: {{NAME: section, …}}.")
    return mixed_rows(section, section.mix, seed=seed, note=note or (lambda _: None))
