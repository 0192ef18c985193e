"""Training: loss curves, and what else the log tells of the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

from markupsafe import Markup

from modicum.report.axes import Point
from modicum.report.charts import Line, finite, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.text import duration, is_number, number, plural

SMOOTH_FROM = 60  # points; below that the raw line is readable
LOG_FROM = 30.0  # ratio of the largest to the smallest loss above which a linear axis hides the end


@dataclass(frozen=True)
class Curve:
    """What one run logged."""

    run: RunView
    color: int
    train: Sequence[Mapping[str, Any]]
    evals: Sequence[Mapping[str, Any]]

    def points(self, key: str, lines: Sequence[Mapping[str, Any]] | None = None) -> list[Point]:
        """Return (step, value); a value that is not finite becomes a gap."""
        found = self.train if lines is None else lines
        return [(float(line["step"]), finite(line[key])) for line in found if key in line]

    @cached_property
    def losses(self) -> list[Point]:
        """Training loss by step."""
        return self.points("loss")

    @cached_property
    def shown(self) -> list[Point]:
        """Training loss as the thick line shows it: smoothed when there are many points."""
        return smooth(self.losses) if len(self.losses) >= SMOOTH_FROM else self.losses

    @property
    def broken(self) -> list[int]:
        """Steps at which the loss was not finite."""
        return [int(step) for step, loss in self.losses if loss is None]


@section(order=20)
def training(run: RunView) -> Section | None:
    """Draw every run that logged training steps, over one another."""
    curves: list[Curve] = []
    for part in run.walk():
        train = _by_step(part, "train", "loss")
        if train:
            curves.append(Curve(part, len(curves), train, _by_step(part, "eval", "eval_loss")))
    if not curves:
        return None
    body = _loss(curves) + _others(curves) + _table(curves)
    return Section("Training", body, findings=tuple(_finding(curve) for curve in curves), stats=_stats(curves))


def _by_step(run: RunView, event: str, key: str) -> list[Mapping[str, Any]]:
    """Return the log's lines that tell ``key``, by step; a run that was resumed logged some steps twice."""
    lines = {line["step"]: line for line in run.log(event) if key in line and is_number(line.get("step"))}
    return [lines[step] for step in sorted(lines)]


def _loss(curves: Sequence[Curve]) -> Markup:
    smoothed = [curve for curve in curves if len(curve.losses) >= SMOOTH_FROM]
    lines = [Line(curve.losses, curve.color, style="faint") for curve in smoothed]
    lines += [Line(curve.shown, curve.color, curve.run.name, number(_last(curve.shown))) for curve in curves]
    for curve in curves:
        lines.append(Line(curve.points("eval_loss", curve.evals), curve.color, style="dots"))
    known = [y for line in lines for _, y in line.points if y is not None]
    log = bool(known) and min(known) > 0 and max(known) / min(known) > LOG_FROM
    dots = any(line.style == "dots" and line.points for line in lines)
    remarks = [
        "Thin: as logged. Thick: running mean, from which the numbers are taken." if smoothed else "",
        "Dots: loss on held-out data." if dots else "",
        "Logarithmic axis." if log else "",
    ]
    picture = line_chart(
        lines,
        title="Training loss",
        x_label="step",
        describe="Training loss by step. " + " ".join(_words(curve) for curve in curves),
        height=300,
        log=log,
    )
    return figure(picture, caption=" ".join(filter(None, remarks)), numbers=_numbers(curves))


def _others(curves: Sequence[Curve]) -> Markup:
    pictures = []
    for key, title in (
        ("learning_rate", "Learning rate"),
        ("grad_norm", "Gradient norm"),
        ("tokens_per_second", "Tokens per second"),
    ):
        lines = [Line(points := curve.points(key), curve.color, style=_weight(points)) for curve in curves]
        if sum(len(line.points) for line in lines) > len(lines):
            pictures.append(
                line_chart(lines, title=title, x_label="step", describe=f"{title} by step.", height=120, from_zero=True)
            )
    return figure(grid(pictures)) if pictures else Markup("")


def _weight(points: Sequence[Point]) -> str:
    return "thin" if len(points) >= SMOOTH_FROM else "solid"


def _table(curves: Sequence[Curve]) -> Markup:
    return table(
        ["Run", "Steps", "First loss", "Last loss", "Held-out loss", "Tokens/s", "Time"],
        (
            [
                Markup('<span class="swatch c{}">{}</span>').format(curve.color % 8, curve.run.name),
                number(curve.train[-1]["step"]),
                number(_first(curve.shown)),
                number(_last(curve.shown)),
                number(_last(curve.points("eval_loss", curve.evals))),
                number(_mean(curve.points("tokens_per_second"))),
                duration(curve.run.record.get("seconds")),
            ]
            for curve in curves
        ),
    )


def _numbers(curves: Sequence[Curve]) -> Markup:
    """Tabulate a dozen steps, evenly spaced and with the last."""
    rows = []
    for curve in curves:
        points = curve.losses
        picked = sorted({round(i * (len(points) - 1) / 11) for i in range(12)})
        rows += [[curve.run.name, number(int(points[i][0])), number(curve.train[i]["loss"], 4)] for i in picked]
    return table(["Run", "Step", "Loss"], rows)


def smooth(points: Sequence[Point]) -> list[Point]:
    """Return a centered running mean over a twentieth of the series; a gap stays a gap."""
    reach = max(1, len(points) // 40)
    sums = list(accumulate((value or 0.0 for _, value in points), initial=0.0))
    counts = list(accumulate((value is not None for _, value in points), initial=0))
    result: list[Point] = []
    for i, (x, y) in enumerate(points):
        # Losses fall steeply at first: a window that reached further to one side would bend the curve there.
        first, last = i - min(reach, i), min(i + min(reach, i) + 1, len(points))
        result.append((x, None if y is None else (sums[last] - sums[first]) / (counts[last] - counts[first])))
    return result


def _finding(curve: Curve) -> Markup:
    if curve.broken:
        return Markup("<b>{}</b> broke: its loss is not a number in {} of {} logged steps, first at step {}.").format(
            curve.run.name, number(len(curve.broken)), number(len(curve.losses)), number(curve.broken[0])
        )
    verb = "has brought" if curve.run.status == "running" else "brought"
    return Markup("<b>{}</b> {} the training loss from {} to {} in {}.").format(
        curve.run.name,
        verb,
        number(_first(curve.shown)),
        number(_last(curve.shown)),
        plural(int(curve.train[-1]["step"]), "step"),
    )


def _words(curve: Curve) -> str:
    return f"{curve.run.name}: {number(_first(curve.shown))} to {number(_last(curve.shown))}."


def _stats(curves: Sequence[Curve]) -> tuple[Stat, ...]:
    if len(curves) > 1:
        return ()
    return (Stat("Last training loss", number(_last(curves[0].shown)), curves[0].run.name),)


def _first(points: Sequence[Point]) -> float | None:
    return next((y for _, y in points if y is not None), None)


def _last(points: Sequence[Point]) -> float | None:
    return _first(points[::-1])


def _mean(points: Sequence[Point]) -> float | None:
    known = [y for _, y in points if y is not None]
    return sum(known) / len(known) if known else None
