"""Looped models: what leaving early saved, which exits were compared, and which visits of a layer matter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from markupsafe import Markup

from modicum.report.html import figure, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import is_number, number, plain

MEASURED = "Time is compared on passes that were made both ways. Visits count those by which an exit is decided."
ZERO = (
    "The published reading is that much attention on the zero token means little need of the layer: a rank correlation "
    "below 0."
)


@section(order=55)
def looping(run: RunView) -> Section | None:
    """Draw what is there of the three."""
    spent = [(cell, cell["spent"]) for part in run.walk() for cell in _cells(part.metrics)]
    exits = [found for part in run.walk() if isinstance(found := part.metrics.get("criteria"), Mapping)]
    visits = [found for part in run.walk() if isinstance(found := part.metrics.get("importance"), Mapping)]
    exits = [found for found in exits if all(isinstance(x, Mapping) and "mean_cycles" in x for x in found.values())]
    parts = [_spent(spent)] if spent else []
    parts += [_exits(found) for found in exits] + [_importance(found) for found in visits]
    return Section("Looped models", Markup("").join(parts)) if parts else None


def _cells(metrics: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    cells = metrics.get("cells")
    for cell in cells if isinstance(cells, list) else ():
        if isinstance(cell, Mapping) and isinstance(cell.get("spent"), Mapping):
            yield cell


def _share(value: object) -> str:
    return f"{100 * value:.0f} %" if is_number(value) else "–"


def _spent(found: list[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> Markup:
    head = ["Model", "Task", "Cycles a token", "Visits saved", "Time saved", "Tokens/s"]
    rows = (
        [
            str(cell.get("model")), str(cell.get("task")), number(spent.get("mean_cycles")),
            _share(spent.get("visits_saved")), _share(spent.get("time_saved")), number(spent.get("tokens_per_second")),
        ]
        for cell, spent in found
    )  # fmt: skip
    return figure(Markup("<h3>What leaving early saved</h3>") + table(head, rows, texts=2), caption=MEASURED)


def _exits(found: Mapping[str, Mapping[str, Any]]) -> Markup:
    names = ("mean_cycles", "visits", "loss", "full_loss", "threshold")
    rows = ([plain(name), *(number(point.get(key), 4) for key in names)] for name, point in found.items())
    head = ["Leaves by", "Cycles a token", "Visits a token", "Loss", "Loss of all cycles", "Threshold"]
    return figure(Markup("<h3>Exits at the allowed loss</h3>") + table(head, rows, texts=1))


def _importance(found: Mapping[str, Any]) -> Markup:
    listed = found.get("visits")
    visits = [visit for visit in (listed if isinstance(listed, list) else ()) if isinstance(visit, Mapping)]
    names = ("layer", "cycle", "zero_attention", "loss_increase")
    rows = ([number(visit.get(name)) for name in names] for visit in visits)
    head = ["Layer", "Cycle", "Attention on the zero token", "Rise of the loss without the visit"]
    rank = number(found.get("rank_correlation"), 2)
    return figure(
        Markup("<h3>What each visit is worth</h3>") + table(head, rows, texts=0),
        caption=f"Rank correlation {rank}. {ZERO}",
    )
