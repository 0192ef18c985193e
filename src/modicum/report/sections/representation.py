"""How models see prompts from inside: two components of the hidden states, and what the numbers beside them say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from modicum.report.charts import Line, finite, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import number

READ = (
    "Each dot is a prompt, on two components of the hidden states of plain prompts. Where wrapped harmful requests lie "
    "among the plain harmless ones, the model may take them for harmless; the gap is positive where they lie nearer to "
    "the harmful ones. The probe has seen plain prompts alone, and is tested on harmful against harmless requests in "
    "the same wrappers: near 0.5 it knows nothing there."
)


@section(order=15)
def representation(run: RunView) -> Section | None:
    """Show the states of every job that read some."""
    found = [part.metrics["representation"] for part in run.walk() if "representation" in part.metrics]
    cells = [cell for one in found if isinstance(one, Mapping) for cell in one.get("cells", ())]
    cells = [cell for cell in cells if isinstance(cell, Mapping) and isinstance(cell.get("points"), Mapping)]
    if not cells:
        return None
    body = figure(grid([_picture(cell) for cell in cells]), caption=READ, numbers=_numbers(cells))
    return Section("Seen from inside", body, tuple(_findings(cells)))


def _picture(cell: Mapping[str, Any]) -> Markup:
    lines, color = [], 0
    for suite, kinds in cell["points"].items():
        for kind, rows in kinds.items():
            points = [(x, y) for x, y in rows if finite(x) is not None and finite(y) is not None]
            lines.append(Line(points, color=color, label=f"{suite}, {kind}", style="dots"))
            color += 1
    return line_chart(
        lines,
        title=f"{cell['target']}: second component",
        x_label="first component",
        describe=f"prompts as {cell['target']} sees them after block {cell.get('layer')}",
    )


def _numbers(cells: list[Mapping[str, Any]]) -> Markup:
    rows = []
    for cell in cells:
        outcome = cell.get("outcome") or {}
        for suite, found in (cell.get("suites") or {}).items():
            keys = ("gap", "from_harmful", "from_harmless", "auroc", "recall", "false_alarms")
            rows.append(
                [cell["target"], suite, number(cell.get("distance")), *(number(found.get(key)) for key in keys),
                 number((outcome.get("suites") or {}).get(suite)), number(outcome.get("auroc"))]
            )  # fmt: skip
    headers = ["Model", "Wrappers", "Plain apart", "Gap", "From plain harmful", "From plain harmless"]
    headers += ["Probe's area", "Recall", "False alarms", "Outcome foretold here", "Over all wrappers"]
    return table(headers, rows, texts=2)


def _findings(cells: list[Mapping[str, Any]]) -> list[str | Markup]:
    said: list[str | Markup] = []
    for cell in cells:
        suites = cell.get("suites") or {}
        gaps = [value for found in suites.values() if (value := finite(found.get("gap"))) is not None]
        if gaps:
            near = sum(gap > 0 for gap in gaps)
            said.append(
                Markup("<b>{}</b> sees harmful requests in {} of {} wrappers nearer to harmful plain ones.").format(
                    cell["target"], near, len(gaps)
                )
            )
    return said
