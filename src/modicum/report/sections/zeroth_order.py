"""Zeroth-order training: what it kept in memory, what a step cost, and the loss against forwards and against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from modicum.report.axes import Point
from modicum.report.charts import Line, finite, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.sections.measurements import size
from modicum.report.sections.training import SMOOTH_FROM, smooth
from modicum.report.text import duration, is_number, number

AXES = (("forwards", "loss evaluations"), ("seconds", "seconds of training"))


@section(order=22)
def zeroth_order(run: RunView) -> Section | None:
    """Draw every run whose log counts forward passes."""
    found = [(part, lines) for part in run.walk() if (lines := _lines(part))]
    if not found:
        return None
    charts = [_chart(found, key, label) for key, label in AXES]
    body = figure(
        grid(charts, wide=True),
        caption="A loss evaluation is one forward pass over a batch; methods differ in how many a step takes.",
        numbers=_numbers(found),
    )
    return Section("Zeroth-order training", body + _costs(found), findings=tuple(_findings(found)))


def _lines(run: RunView) -> list[Mapping[str, Any]]:
    """Return the logged steps that tell their cost, by step; a resumed run logged some twice."""
    wanted = ("step", "forwards", "seconds")
    lines = {
        line["step"]: line
        for line in run.log("train")
        if "loss" in line and all(is_number(line.get(k)) for k in wanted)
    }
    return [lines[step] for step in sorted(lines)]


def _chart(found: Sequence[tuple[RunView, list[Mapping[str, Any]]]], key: str, label: str) -> Markup:
    lines = []
    for color, (part, logged) in enumerate(found):
        points: list[Point] = [(float(line[key]), finite(line["loss"])) for line in logged]
        shown = smooth(points) if len(points) >= SMOOTH_FROM else points
        # Costs are counted from nothing, which also gives a run of less than a second an axis.
        lines.append(Line([(0.0, None), *shown], color, part.name, number(shown[-1][1])))
    return line_chart(lines, title="Training loss", x_label=label, describe=f"Training loss by {label}.", height=200)


def _numbers(found: Sequence[tuple[RunView, list[Mapping[str, Any]]]]) -> Markup:
    """Tabulate a dozen steps of each run, evenly spaced and with the last."""
    rows = []
    for part, logged in found:
        for index in sorted({round(i * (len(logged) - 1) / 11) for i in range(12)}):
            line = logged[index]
            cells = [number(line[key]) for key in ("step", "forwards")]
            rows.append([part.name, *cells, duration(line["seconds"]), number(finite(line["loss"]), 4)])
    return table(["Run", "Step", "Evaluations", "Time", "Loss"], rows)


def _costs(found: Sequence[tuple[RunView, list[Mapping[str, Any]]]]) -> Markup:
    """Tabulate memory by part and the work of a step, of the runs that ended."""
    known = [(part, costs) for part, _ in found if (costs := _metrics(part))]
    if not known:
        return Markup("")
    memory = table(
        ["Run", "Model", "of it trained", "Factors", "State", "AdamW would add"],
        (
            [
                part.name,
                *(_size(costs.get(key)) for key in ("model_bytes", "weight_bytes", "factor_bytes", "state_bytes")),
                # A gradient and two moments for each number that is trained.
                _size(3 * costs["weight_bytes"] if is_number(costs.get("weight_bytes")) else None),
            ]
            for part, costs in known
        ),
        caption="Memory by part, without activations",
    )
    work = table(
        ["Run", "Evaluations", "Passes over the weights", "Random numbers", "Coordinates", "Parameters"],
        (
            [
                part.name,
                *(number(costs.get(f"{key}_per_step")) for key in ("forwards", "weight_passes", "draws")),
                *(number(costs.get(key)) for key in ("coordinates", "parameters")),
            ]
            for part, costs in known
        ),
        caption="Work of a step",
    )
    return memory + work


def _findings(found: Sequence[tuple[RunView, list[Mapping[str, Any]]]]) -> list[Markup]:
    sentences = []
    for part, logged in found:
        costs = _metrics(part)
        extra = [x for key in ("factor_bytes", "state_bytes") if is_number(x := costs.get(key))]
        if not extra:
            continue
        sentences.append(
            Markup("<b>{}</b> trained with {} loss evaluations in {}, keeping {} beside the model.").format(
                part.name, number(logged[-1]["forwards"]), duration(logged[-1]["seconds"]), size(sum(extra))
            )
        )
    return sentences


def _metrics(run: RunView) -> Mapping[str, Any]:
    found = run.metrics.get("zeroth_order")
    return found if isinstance(found, Mapping) else {}


def _size(count: object) -> str | None:
    return size(count) if is_number(count) else None
