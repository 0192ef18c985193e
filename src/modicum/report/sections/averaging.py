"""Averaged checkpoints: which went in, what each is worth alone, the rules beside the choice, and the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from markupsafe import Markup

from modicum.report.charts import Line, Scale, finite, heat_map, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import is_number, number, phrase

WHERE = {
    "held_out": "held-out data",
    "held_out and data": "held-out data of which some rows were searched too",
    "data": "the data that was searched",
}


@section(order=32)
def averaging(run: RunView) -> Section | None:
    """Show every run that averaged checkpoints."""
    found = [part for part in run.walk() if isinstance(part.metrics.get("coefficients"), Mapping)]
    if not found:
        return None
    bodies, findings = [], []
    for part in found:
        name = Markup("<h3>{}</h3>").format(part.name) if len(found) > 1 else Markup("")
        bodies.append(
            name + _chosen(part) + _rules(part) + _curves(part) + _windows(part) + _greedy(part) + _tried(part)
        )
        findings += _findings(part)
    return Section("Averaged checkpoints", Markup("").join(bodies), findings=tuple(findings))


def _measured(run: RunView) -> Mapping[str, Any]:
    found = run.metrics.get("averaging")
    return found if isinstance(found, Mapping) else {}


def _trace(run: RunView) -> Mapping[str, Any]:
    """Return what the choice's search reports."""
    found = _measured(run).get("trace")
    return found if isinstance(found, Mapping) else {}


def _traced(run: RunView, key: str) -> tuple[Any, Mapping[str, Any]]:
    """Return what a search reports under a key, the choice's before those of other rules, and all that it reports."""
    traces = [_trace(run), *(rule.get("trace") or {} for rule in _measured(run).get("rules") or [])]
    return next(((trace[key], trace) for trace in traces if trace.get(key)), ([], {}))


def _names(run: RunView) -> list[str]:
    return [Path(str(name)).name for name in run.metrics["coefficients"]]


def _chosen(run: RunView) -> Markup:
    """Tabulate coefficient, loss alone and, where a search had them, logit of each checkpoint."""
    names, shares = _names(run), list(run.metrics["coefficients"].values())
    alone, logits = _measured(run).get("single") or [], _trace(run).get("logits") or []
    heads = ["Checkpoint", "Coefficient", *(["Loss alone"] if alone else []), *(["Logit"] if logits else [])]
    rows = []
    for i, (name, share) in enumerate(zip(names, shares)):
        cells = [number(share) if share else None]
        cells += [number(alone[i], 4)] if alone else []
        cells += [number(logits[i])] if logits else []
        rows.append([name, *cells])
    return table(heads, rows, caption="What went in")


def _rules(run: RunView) -> Markup:
    rules = _measured(run).get("rules") or []
    if len(rules) < 2:
        return Markup("")
    rows = [
        [
            rule["name"],
            str(sum(bool(c) for c in rule["coefficients"])),
            _interval(rule["loss"]),
            None if i == 0 else _interval(rule["difference"], signed=True),
        ]
        for i, rule in enumerate(rules)
    ]
    where = WHERE.get(_measured(run).get("measured_on", ""), WHERE["data"])
    caption = f"Losses on {where}; intervals are over batches, differences to the choice on the same batches."
    return table(["Rule", "Checkpoints", "Loss", "Difference"], rows, caption=caption)


def _interval(found: Sequence[float | None], *, signed: bool = False) -> str:
    value, low, _ = found
    text = number(value, 4)
    if signed and is_number(value) and value > 0:
        text = f"+{text}"
    return text if low is None or value is None else f"{text} ± {number(value - low, 2)}"


def _curves(run: RunView) -> Markup:
    """Draw the loss against the number of checkpoints, and the rolling mean along the run."""
    charts = []
    lines = []
    evaluated, surrogate = _traced(run, "curve")[0], _traced(run, "surrogate")[0]
    if evaluated:
        points = [(float(k), finite(loss)) for k, loss in enumerate(evaluated, 1)]
        lines.append(Line(points, 0, "evaluated", number(points[-1][1])))
    if len(surrogate) > 1:
        points = [(float(k), finite(loss)) for k, loss in surrogate]
        lines.append(Line(points, 1, "surrogate", number(points[-1][1])))
    if lines:
        charts.append(
            line_chart(
                lines,
                title="Loss by number of checkpoints",
                x_label="checkpoints averaged",
                describe="Loss of the best mean of each number of checkpoints.",
                height=200,
            )
        )
    curve = _measured(run).get("curve")
    if isinstance(curve, Mapping):
        last, alone = curve["last"], _measured(run).get("single") or []
        rolling = [(float(i), finite(loss)) for i, loss in enumerate(curve["loss"], last)]
        single = [(float(i), finite(loss)) for i, loss in enumerate(alone, 1)]
        both = [Line(rolling, 0, f"mean of {last}", number(rolling[-1][1]))]
        both += [Line(single, 1, "alone", number(single[-1][1]), style="thin")] if single else []
        charts.append(
            line_chart(
                both,
                title="Loss along the run",
                x_label="checkpoint",
                height=200,
                describe=f"Loss of each checkpoint and of the mean of the latest {last} up to it.",
            )
        )
    return figure(grid(charts, wide=True)) if charts else Markup("")


def _windows(run: RunView) -> Markup:
    """Draw the loss of the mean of every contiguous window, by start and length."""
    windows, trace = _traced(run, "windows")
    found = {(start, length): loss for start, length, loss in windows}
    if len(found) < 4:
        return Markup("")
    names, longest = _names(run), max(length for _, length in found)
    values = [[finite(found.get((start, length))) for start in range(len(names))] for length in range(1, longest + 1)]
    shown = sorted(value for row in values for value in row if value is not None)
    what = "Estimate by the surrogate of the loss" if trace.get("surrogate") else "Loss"
    # A few windows over a break would take all the ink.
    scale = Scale(shown[0], shown[min(len(shown) - 1, int(0.9 * len(shown)))])
    drawn = heat_map(
        [str(length) for length in range(1, longest + 1)],
        [str(start + 1) for start in range(len(names))],
        values,
        title=f"{what} of the mean of a window, by its length",
        describe=f"{what} of the mean of every contiguous window of checkpoints, by start and length.",
        scale=scale,
        x_label="first checkpoint",
    )
    return figure(drawn, scale.legend("loss"), caption="Paler is better. Rows are lengths, columns first checkpoints.")


def _tried(run: RunView) -> Markup:
    """Tabulate the candidates of the surrogate that were evaluated."""
    names, found = _names(run), _traced(run, "tried")[0]
    rows = []
    for weights, estimate, loss in found:
        used = [name for name, weight in zip(names, weights) if weight]
        shown = phrase(used) if len(used) <= 6 else f"{len(used)} of {len(names)} checkpoints"
        rows.append([shown, number(estimate, 4), number(loss, 4)])
    heads = ["Candidate", "By the surrogate", "Evaluated"]
    return (
        table(heads, rows, caption="Candidates that were evaluated on the data of the search") if rows else Markup("")
    )


def _greedy(run: RunView) -> Markup:
    told = _traced(run, "greedy")[0]
    names = _names(run)
    rows = [
        [names[step["checkpoint"]], number(step["loss"], 4), "kept" if step["kept"] else "left out"] for step in told
    ]
    return table(["Checkpoint", "Loss with it", "so"], rows, caption="What adding each one did") if rows else Markup("")


def _findings(run: RunView) -> list[str | Markup]:
    names, shares = _names(run), list(run.metrics["coefficients"].values())
    used = [name for name, share in zip(names, shares) if share]
    shown = phrase(used) if len(used) <= 6 else f"{len(used)} of {len(names)} checkpoints"
    sentences: list[str | Markup] = [Markup("<b>{}</b> is the mean of {}.").format(run.name, shown)]
    rules = _measured(run).get("rules") or []
    others = [rule for rule in rules[1:] if is_number(rule["loss"][0])]
    if others:
        best = min(others, key=lambda rule: rule["loss"][0])
        value, low, high = best["difference"]
        clear = low is not None and (low > 0 or high < 0)
        verb = "is worse than the choice" if value > 0 else "is better than the choice"
        said = f"{verb} by {number(abs(value))}" if clear else "and the choice cannot be told apart"
        sentences.append(
            Markup("Of the other rules <b>{}</b> is the best, {} on these batches.").format(
                best["name"], f"which {said}" if clear else said
            )
        )
    if breaks := regimes(run):
        sentences.append(
            Markup("The checkpoints fall into regimes: a mean over the break after {} is worse than each side.").format(
                phrase(names[i] for i in breaks)
            )
        )
    return sentences


def regimes(run: RunView) -> list[int]:
    """Return after which checkpoints a break lies: the mean of two neighbours is worse than both alone."""
    windows = {(start, length): loss for start, length, loss in _traced(run, "windows")[0]}
    found = []
    for i, j in pairwise(range(len(run.metrics["coefficients"]))):
        both, one, other = (windows.get(key) for key in ((i, 2), (i, 1), (j, 1)))
        if is_number(both) and is_number(one) and is_number(other) and both > max(one, other):
            found.append(i)
    return found
