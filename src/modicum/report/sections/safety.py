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
    "Share of harmful prompts for which all of N samples were unsafe, averaged over the wrapped families; beside it, "
    "where all samples were drawn, the share for which any was, as an attacker sees it. A defender's curve that "
    "falls says that safe answers can be sampled; where `malformed` is large, many of them are gibberish. "
    "Stopping early saves little where many prompts are never safe: each of them costs all its draws."
)
CURVES = {"asr_all": "all N samples", "asr_any": "any of N samples"}
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
    headers += ["Unread", "Draws", "Never safe", "Saved by malformed", "Lost", "Tokens", "n"]
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
                measure(cell.get("escapes_malformed"), "share"),
                number(cell.get("lost")),
                number(cell.get("tokens")),
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
    """Draw the defender's curves, and the attacker's beside them where all samples were drawn."""
    charts, rows = [], []
    for curve, what in CURVES.items():
        lines = []
        for color, (target, points) in enumerate(_averaged(cells, curve)):
            shown = [(float(n), at["value"] or 0.0) for n, at in points]
            lines.append(Line(shown, color=color, label=target, value=measure(shown[-1][1], "share")))
            rows += [[target, what, number(n), measure(at["value"], "share"), _ends(at)] for n, at in points]
        if lines:
            charts.append(
                line_chart(
                    lines,
                    title=f"{what} unsafe",
                    x_label="N",
                    describe=f"share of prompts with {what} unsafe, over N, one line for each model",
                    from_zero=True,
                )
            )
    if not charts:
        return None
    headers = ["Model", "Counts", "N", "Share", "Interval, mean over families"]
    return figure(grid(charts), caption=READ_CURVES, numbers=table(headers, rows, texts=2))


def _average(estimates: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return the mean of some families' shares; its ends are their means' too, which is wider than needed."""
    ends = {end: [finite(one.get(end)) for one in estimates] for end in ("value", "low", "high")}
    return {
        end: None if None in values else sum(value or 0.0 for value in values) / len(values)
        for end, values in ends.items()
    }


def _averaged(
    cells: Sequence[Mapping[str, Any]], curve: str
) -> Iterator[tuple[str, list[tuple[int, dict[str, float | None]]]]]:
    """Yield the curve of each model, averaged over the families that training has not seen."""
    for target in dict.fromkeys(str(cell["target"]) for cell in cells):
        own = [cell for cell in cells if cell["target"] == target and cell.get(curve)]
        own = [cell for cell in own if cell.get("attack", cell["suite"]) != "plain"] or own
        if own:
            columns = list(zip(*(cell[curve] for cell in own), strict=True))
            yield target, [(n, _average(column)) for n, column in zip(own[0]["ns"], columns, strict=True)]


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
    if found.get("given"):
        rows.append(["rows of the data's own answers", number(found.get("given"))])
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
