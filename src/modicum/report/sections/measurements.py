"""Every other number that a job measured, so that no result is left out because nobody drew it yet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from modicum.report.html import table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import duration, is_number, number, plain

DRAWN = ("layers", "zeroth_order", "routing_conflict", "routing_bytes", "distilled")  # sections of their own show these


@section(order=40)
def measurements(run: RunView) -> Section | None:
    """Tabulate plain numbers and short texts among the metrics of every run that is no pipeline."""
    tables = []
    for part in run.walk():
        # A pipeline repeats what its stages measured.
        rows = [] if part.stages else list(_flat(part.metrics))
        if rows:
            tables.append(table(["Measure", "Value"], rows, caption=part.name))
    if not tables:
        return None
    return Section("Measurements", Markup('<div class="grid tables">{}</div>').format(Markup("").join(tables)))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[list[str]]:
    for key, value in values.items():
        name = f"{prefix}{plain(str(key))}"
        if is_number(value):
            yield [name, _written(str(key), value)]
        elif isinstance(value, (str, bool)) and len(str(value)) <= 60:
            yield [name, str(value)]
        elif isinstance(value, Mapping) and not prefix and key not in DRAWN:
            yield from _flat(value, f"{name}: ")


def _written(key: str, value: float) -> str:
    if key == "seconds" or key.endswith("_seconds"):
        return duration(value)
    if key.endswith("bytes") or key.startswith("memory"):
        return size(value)
    return number(value)


def size(count: float) -> str:
    """Write a number of bytes.

    Example:
        >>> size(512), size(269_000_000)
        ('512 B', '269 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
