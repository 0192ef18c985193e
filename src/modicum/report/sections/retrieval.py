"""Retrieval: what each model finds in its context, by where it stands and how long the context is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from modicum.report.charts import Scale, finite, heat_map
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import number

READ = (
    "Each cell is the mean score of the questions whose fact stands at that depth (0 is the beginning of the context) "
    "of a context of that length. Darker is better; pictures share one scale from 0 to 1."
)


@section(order=15)
def retrieval(run: RunView) -> Section | None:
    """Draw a heat map of depth by length for every model and retrieval task."""
    cells = list(_cells(run))
    if not cells:
        return None
    scale = Scale(0.0, 1.0)
    maps = grid(_map(cell, scale) for cell in cells)
    body = figure(maps, scale.legend("mean score"), caption=READ, numbers=_numbers(cells))
    return Section("Retrieval by depth and length", body)


def _cells(run: RunView) -> Iterator[Mapping[str, Any]]:
    for part in run.walk():
        cells = part.metrics.get("cells")
        for cell in cells if isinstance(cells, list) else ():
            if isinstance(cell, Mapping) and isinstance(cell.get("grid"), Mapping):
                yield cell


def _map(cell: Mapping[str, Any], scale: Scale) -> Markup:
    found = cell["grid"]
    values = [[finite(value) for value in row] for row in found["values"]]
    known = [value for row in values for value in row if value is not None]
    worst = min(known, default=0.0)
    return heat_map(
        [f"depth {number(depth)}" for depth in found["depths"]],
        [number(length) for length in found["lengths"]],
        values,
        title=f"{cell.get('model', '?')}: {cell.get('task', '?')}",
        describe=f"mean score by depth and length, between {number(worst)} and {number(max(known, default=0.0))}",
        scale=scale,
        x_label="length",
        every=1,
    )


def _numbers(cells: list[Mapping[str, Any]]) -> Markup:
    return table(
        ["Model", "Task", "Depth", "Length", "Score", "n"],
        (
            [cell.get("model", "?"), cell.get("task", "?"), number(depth), number(length), number(value), number(count)]
            for cell in cells
            for depth, values, counts in zip(
                cell["grid"]["depths"], cell["grid"]["values"], cell["grid"]["counts"], strict=True
            )
            for length, value, count in zip(cell["grid"]["lengths"], values, counts, strict=True)
            if value is not None
        ),
        texts=2,
    )
