"""Paired differences: two models on the same items, which separates them far better than two intervals do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from modicum.report.axes import ticks
from modicum.report.html import figure, grid, table
from modicum.report.metrics import Metric, metric_of
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import change, is_number, number, plain


@section(order=12)
def differences(run: RunView) -> Section | None:
    """Draw each difference with its interval around zero."""
    found = [pair for part in run.walk() for pair in _pairs(part.metrics)]
    if not found:
        return None
    groups: dict[tuple[str, Metric], list[Mapping[str, Any]]] = {}
    for pair in found:
        groups.setdefault((str(pair.get("task", "all tasks")), metric_of(pair)), []).append(pair)
    panels = [_panel(task, metric, pairs) for (task, metric), pairs in groups.items()]
    numbers = table(
        ["Models", "Task", "Difference", "Low", "High", "n"],
        (
            [
                f"{pair['a']} − {pair['b']}",
                str(pair.get("task", "")),
                *(_signed(pair.get(key), pair) for key in ("difference", "low", "high")),
                number(pair.get("n")),
            ]
            for pair in found
        ),
        texts=2,
    )
    caption = "Difference on the same items, with its interval. Colored where the interval leaves out zero."
    return Section("Paired differences", figure(grid(panels), caption=caption, numbers=numbers))


def _pairs(metrics: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    raw = metrics.get("pairs")
    return [
        pair
        for pair in (raw if isinstance(raw, list) else ())
        if isinstance(pair, Mapping) and "a" in pair and "b" in pair and is_number(pair.get("difference"))
    ]


def _panel(task: str, metric: Metric, pairs: list[Mapping[str, Any]]) -> Markup:
    ends = [pair[key] for pair in pairs for key in ("difference", "low", "high") if is_number(pair.get(key))]
    reach = ticks(0.0, max(map(abs, ends)), 4)[-1]
    rows = Markup("").join(_row(pair, reach) for pair in pairs)
    better = {"higher": "right is better", "lower": "left is better"}.get(metric.better or "", plain(metric.name))
    return Markup(
        '<table class="bars differences"><caption>{}<span>{}</span></caption><tbody>{}</tbody></table>'
    ).format(task, better, rows)


def _row(pair: Mapping[str, Any], reach: float) -> Markup:
    value = pair["difference"]
    low, high = (pair[key] if is_number(pair.get(key)) else value for key in ("low", "high"))

    def place(x: float) -> float:
        return 50 * (1 + x / reach)

    return Markup(
        '<tr{}><th scope="row">{} <span class="against">vs {}</span></th>'
        '<td class="bar"><div><b style="left:{:.2f}%;width:{:.2f}%"></b><u style="left:{:.2f}%"></u></div></td>'
        '<td class="number">{}</td></tr>'
    ).format(
        Markup(' class="best"') if low > 0 or high < 0 else "",
        pair["a"],
        pair["b"],
        place(low),
        place(high) - place(low),
        place(value),
        _signed(value, pair),
    )


def _signed(value: object, pair: Mapping[str, Any]) -> str:
    return change(value, metric_of(pair).unit)
