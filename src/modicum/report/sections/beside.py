"""What stands beside a score: over-refusal beside refusal, lengths and log-probabilities beside accuracy on pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from modicum.report.html import figure, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import number, plain


@section(order=13)
def beside(run: RunView) -> Section | None:
    """Draw a table for each task whose score should not be read alone."""
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for part in run.walk():
        cells = part.metrics.get("cells")
        for cell in cells if isinstance(cells, list) else ():
            more = cell.get("beside") if isinstance(cell, Mapping) else None
            if isinstance(more, Mapping) and more:
                model = str(cell.get("model"))
                name = f"{part.name}: {model}" if model in found.get(str(cell.get("task")), {}) else model
                found.setdefault(str(cell.get("task")), {})[name] = cell
    if not found:
        return None
    return Section("Beside the scores", Markup("").join(_task(task, models) for task, models in found.items()))


def _task(task: str, models: Mapping[str, Mapping[str, Any]]) -> Markup:
    labels = list(dict.fromkeys(str(label) for cell in models.values() for label in cell["beside"]))
    metric = plain(str(next(iter(models.values())).get("metric", "score")))
    rows = [
        [model, number(cell.get("value")), *(number(cell["beside"].get(label)) for label in labels)]
        for model, cell in models.items()
    ]
    return Markup("<h3>{}</h3>{}").format(task, figure(table(["Model", metric, *labels], rows)))
