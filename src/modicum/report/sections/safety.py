"""Safety: attack success by family with the refusals of harmless requests beside it, curves over N, and what judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from modicum.report.charts import Line, Scale, finite, heat_map, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.text import measure, number

READ_FAMILIES = (
    "First: harmful requests that were answered (greedily); second: those that were declined. What is neither is "
    "malformed, which is no sign of caution. Third: harmless requests in the same wrappers that were refused. A model "
    "is good where the second is dark and the others are pale; refusing everything makes both refusals dark."
)
READ_CURVES = (
    "Share of harmful prompts for which all of N samples were unsafe, averaged over the wrapped families. A curve that "
    "falls says that safe answers can be sampled; where `malformed` is large, many of them are gibberish. "
    "Stopping early saves little where many prompts are never safe: each of them costs all its draws."
)
READ_TRADE = "Attack success against refusals of harmless requests, a dot for each model. Low and left is better."


@section(order=14)
def safety(run: RunView) -> Section | None:
    """Show attacks and over-refusal of every attack job, and the filters of every synthesis."""
    attacks = [found for part in run.walk() if isinstance(found := part.metrics.get("safety"), Mapping)]
    syntheses = [(part.name, found) for part in run.walk() if isinstance(found := _synthesis(part), Mapping)]
    parts = [*map(_attack, attacks), *(_counters(name, found) for name, found in syntheses)]
    if not parts:
        return None
    findings = [sentence for found in attacks for sentence in _findings(found)]
    stats = [stat for found in attacks for stat in _stats(found)][:3]
    return Section("Safety", Markup("").join(parts), tuple(findings), tuple(stats))


def _synthesis(part: RunView) -> Any:
    return part.metrics.get("synthesis")


def _attack(found: Mapping[str, Any]) -> Markup:
    cells = [cell for cell in found.get("cells", ()) if isinstance(cell, Mapping)]
    parts = [_families(cells), _curves(cells), _trade(found), _judge(found)]
    return Markup("").join(part for part in parts if part)


def _families(cells: Sequence[Mapping[str, Any]]) -> Markup:
    targets = list(dict.fromkeys(str(cell["target"]) for cell in cells))
    suites = list(dict.fromkeys(str(cell["suite"]) for cell in cells))
    by = {(str(cell["target"]), str(cell["suite"])): cell for cell in cells}
    scale = Scale(0.0, 1.0)

    def drawn(field: str, title: str) -> Markup:
        values = [
            [finite(by[target, suite][field]["value"]) if (target, suite) in by else None for suite in suites]
            for target in targets
        ]
        return heat_map(
            targets,
            suites,
            values,
            title=title,
            describe=f"{title}, by model and family",
            scale=scale,
            x_label="family",
            every=1,
        )

    maps = [drawn("greedy", "attack success"), drawn("over_refusal", "harmless requests refused")]
    if all(isinstance(cell.get("refused"), Mapping) for cell in cells):
        maps.insert(1, drawn("refused", "harmful requests refused"))
    return figure(grid(maps), scale.legend("share"), caption=READ_FAMILIES, numbers=_numbers(cells))


def _numbers(cells: Sequence[Mapping[str, Any]]) -> Markup:
    def share(value: Mapping[str, Any] | None) -> str:
        if not isinstance(value, Mapping):
            return number(None)
        return f"{measure(value.get('value'), 'share')} [{_ends(value)}]"

    headers = ["Model", "Family", "Attack success", "Corrected", "Harmful refused", "Harmless refused", "Malformed"]
    headers += ["Unread", "Draws", "Never safe", "n"]
    return table(
        headers,
        (
            [
                cell["target"],
                cell["suite"],
                share(cell["greedy"]),
                measure((cell.get("corrected") or {}).get("value"), "share"),
                share(cell.get("refused")),
                share(cell["over_refusal"]),
                measure(cell.get("malformed"), "share"),
                measure(cell.get("unparsed"), "share"),
                number(cell.get("draws")),
                measure(cell.get("never_safe"), "share"),
                number(cell.get("prompts")),
            ]
            for cell in cells
        ),
        texts=2,
    )


def _ends(value: Mapping[str, Any]) -> str:
    low, high = finite(value.get("low")), finite(value.get("high"))
    return "–" if low is None or high is None else f"{measure(low, 'share')} – {measure(high, 'share')}"


def _curves(cells: Sequence[Mapping[str, Any]]) -> Markup | None:
    lines, rows = [], []
    for color, (target, curve) in enumerate(_averaged(cells)):
        points = [(float(n), value) for n, value in curve]
        lines.append(Line(points, color=color, label=target, value=measure(points[-1][1], "share")))
        rows += [[target, number(n), measure(value, "share")] for n, value in curve]
    if not lines:
        return None
    chart = line_chart(
        lines,
        title="all N samples unsafe",
        x_label="N",
        describe="share of prompts with no safe sample, falling with N, one line for each model",
        from_zero=True,
    )
    return figure(chart, caption=READ_CURVES, numbers=table(["Model", "N", "All unsafe"], rows))


def _averaged(cells: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[int, float]]]]:
    """Yield the curve of each model, averaged over the families that training has not seen."""
    for target in dict.fromkeys(str(cell["target"]) for cell in cells):
        own = [cell for cell in cells if cell["target"] == target and cell.get("asr_all")]
        own = [cell for cell in own if cell["suite"] != "plain"] or own
        if own:
            columns = zip(*([estimate["value"] for estimate in cell["asr_all"]] for cell in own), strict=True)
            yield target, [(n, sum(column) / len(own)) for n, column in zip(own[0]["ns"], columns, strict=True)]


def _trade(found: Mapping[str, Any]) -> Markup | None:
    summaries = found.get("targets")
    if not isinstance(summaries, Mapping) or len(summaries) < 2:
        return None
    # The floor is drawn from end to end, so that the axes are those of all shares, not of the few that occur.
    floor = Line([(0.0, 0.0), (100.0, 0.0)], style="faint")
    dots = [
        Line([(100 * summary["over_refusal"], 100 * summary["asr"])], color=color, label=str(name), style="dots")
        for color, (name, summary) in enumerate(summaries.items())
    ]
    chart = line_chart(
        [floor, *dots],
        title="attack success in wrappers, per cent",
        x_label="harmless requests refused, per cent",
        describe="attack success against over-refusal, one dot for each model",
        from_zero=True,
    )
    rows = [
        [name, *(measure(s.get(field), "share") for field in ("asr", "refused", "over_refusal", "malformed"))]
        for name, s in summaries.items()
    ]
    numbers = table(["Model", "Attack success", "Harmful refused", "Harmless refused", "Malformed"], rows)
    return figure(chart, caption=READ_TRADE, numbers=numbers)


def _judge(found: Mapping[str, Any]) -> Markup:
    judge = found.get("judge")
    if not isinstance(judge, Mapping):
        return Markup("")
    both = [("harm", judge), ("refusal", judge.get("refusal"))]
    rows = [
        [
            what,
            f"{entry.get('judge', '?')}{' (approximate: goes by words)' if entry.get('approximate') else ''}",
            _rate(entry, "fpr"),
            _rate(entry, "fnr"),
            number(entry.get("auroc")),
            number((entry.get("positives") or 0) + (entry.get("negatives") or 0) or None),
        ]
        for what, entry in both
        if isinstance(entry, Mapping)
    ]
    headers = ["Tells", "Judge", "False alarms", "Misses", "Area under curve", "Labelled answers"]
    return table(headers, rows, texts=2, caption="Who judged, and how often it errs on answers labelled by people")


def _rate(entry: Mapping[str, Any], field: str) -> str:
    value = entry.get(field)
    return measure(value.get("value"), "share") if isinstance(value, Mapping) else "not measured"


def _counters(name: str, found: Mapping[str, Any]) -> Markup:
    kept, dropped = found.get("kept") or {}, found.get("dropped") or {}
    rows = [[f"kept, {kind}", number(count)] for kind, count in kept.items()]
    rows += [[f"dropped: {reason}", number(count)] for reason, count in dropped.items()]
    rows.append(["generated", number(found.get("generated"))])
    return table(["Replies of the teacher", "Count"], rows, caption=f"Synthesis {name}")


def _findings(found: Mapping[str, Any]) -> Iterator[str | Markup]:
    for name, summary in (found.get("targets") or {}).items():
        # A share of attacks never stands without the share of harmless requests that were refused.
        declines = f", declines {measure(summary['refused'], 'share')} of them," if "refused" in summary else ""
        yield Markup(
            "<b>{}</b> answers {} of the harmful requests in wrappers{} and refuses {} of the harmless ones in the "
            "same wrappers."
        ).format(name, measure(summary.get("asr"), "share"), declines, measure(summary.get("over_refusal"), "share"))


def _stats(found: Mapping[str, Any]) -> Iterator[Stat]:
    for name, summary in (found.get("targets") or {}).items():
        detail = f"{measure(summary.get('over_refusal'), 'share')} of harmless requests refused"
        yield Stat(f"{name}: attack success", measure(summary.get("asr"), "share"), detail)
