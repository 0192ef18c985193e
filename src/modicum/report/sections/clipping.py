"""Gradient clipping: which tensors were clipped when, and where the loss jumped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from modicum.optim.gradient.clipping_log import read_clipping_log
from modicum.report.charts import Line, Scale, finite, heat_map, line_chart
from modicum.report.html import figure, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import is_number, number, plural

MOST_ROWS, MOST_COLUMNS = 40, 60
SIGMA = 6.0  # a spike, in standard deviations of the window before it


@section(order=25)
def clipping(run: RunView) -> Section | None:
    """Draw the factors of every run that kept a log of its clipping."""
    parts: list[Markup] = []
    findings: list[Markup] = []
    for part in run.walk():
        names, lines = _log(part)
        rows = [line for line in lines if len(_list(line, "factor")) == len(names)]
        if not names or not rows:
            continue
        rates = _rates(names, lines)
        parts.append(_factors(part, names, rows, rates))
        parts.append(_loss(part))
        findings.append(
            Markup("<b>{}</b> clipped a tensor in {} of the steps on average; most often {}, in {}.").format(
                part.name, _share(sum(rates) / len(rates)), names[_top(rates)], _share(max(rates))
            )
        )
    if not parts:
        return None
    return Section("Gradient clipping", Markup("").join(parts), findings=tuple(findings))


def _log(run: RunView) -> tuple[list[str], list[dict[str, Any]]]:
    names, lines = read_clipping_log(run.folder)
    return [str(name) for name in names], [line for line in lines if is_number(line.get("step"))]


def _rates(names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the share of all steps in which each tensor was clipped."""
    parts = [line for line in lines if len(_list(line, "clip_rate")) == len(names) and is_number(line.get("steps"))]
    steps = sum(line["steps"] for line in parts) or 1
    return [
        sum((finite(line["clip_rate"][i]) or 0.0) * line["steps"] for line in parts) / steps for i in range(len(names))
    ]


def _factors(run: RunView, names: Sequence[str], rows: Sequence[Mapping[str, Any]], rates: Sequence[float]) -> Markup:
    count = min(len(rows), MOST_COLUMNS)
    columns = [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]
    means = [_mean([finite(row["factor"][i]) for row in rows]) for i in range(len(names))]
    # The strongest clipped tell the story; a large model has hundreds of tensors.
    shown = sorted(sorted(range(len(names)), key=lambda i: means[i])[:MOST_ROWS])
    picture = heat_map(
        [names[i] for i in shown],
        [number(row["step"]) for row in columns],
        [[finite(row["factor"][i]) for row in columns] for i in shown],
        title=f"Factor on the gradient · {run.name}",
        describe=f"Factor by tensor and step. {names[_top(rates)]} was clipped in {_share(max(rates))} of the steps.",
        scale=Scale(0.0, 2.0, 1.0),
        x_label="step",
        every=max(1, len(columns) // 8),
    )
    caption = "The warmer, the more was cut off; white: left as it was."
    if len(shown) < len(names):
        caption += f" The {len(shown)} most strongly clipped of {plural(len(names), 'tensor')}."
    numbers = table(
        ["Tensor", "Clipped in", "Mean factor", "Last norm", "Last threshold"],
        (
            [
                names[i],
                _share(rates[i]),
                number(means[i]),
                number(_at(rows[-1], "norm", i)),
                number(_at(rows[-1], "threshold", i)),
            ]
            for i in shown
        ),
    )
    return figure(picture, caption=caption, numbers=numbers)


def _loss(run: RunView) -> Markup:
    from modicum.optim.gradient.spikes import spike_score

    points = [
        (float(line["step"]), finite(line.get("loss")))
        for line in run.log("train")
        if is_number(line.get("step")) and "loss" in line
    ]
    window = max(10, len(points) // 10)
    if len(points) <= window:
        return Markup("")
    values = [float("nan") if value is None else value for _, value in points]
    report = spike_score(values, window=window, sigma=SIGMA, two_sided=False)
    marks = [points[i] for i in report.steps]
    picture = line_chart(
        [Line(points, 0, run.name), Line(marks, 1, style="dots")],
        title="Training loss and its spikes",
        x_label="step",
        describe=f"Training loss by step, with {plural(report.count, 'spike')} marked.",
        height=160,
    )
    return figure(
        picture,
        caption=f"{plural(report.count, 'spike')}: logged losses {number(SIGMA)} standard deviations above the "
        f"{window} before. The published score uses a window of 1000 steps and 10 deviations.",
    )


def _list(line: Mapping[str, Any], key: str) -> list[Any]:
    value = line.get(key)
    return value if isinstance(value, list) else []


def _at(line: Mapping[str, Any], key: str, place: int) -> float | None:
    values = _list(line, key)
    return finite(values[place]) if place < len(values) else None


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else 1.0


def _top(rates: Sequence[float]) -> int:
    return max(range(len(rates)), key=lambda i: rates[i])


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
