"""A search of a merge's knobs: every trial, the best one, and what held-out data says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from modicum.report.charts import Line, finite, line_chart
from modicum.report.html import figure, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.text import number


@section(order=33)
def merge_search(run: RunView) -> Section | None:
    """Show every run that searched a merge's knobs."""
    found = [part for part in run.walk() if part.job == "search" and part.metrics.get("trials")]
    if not found:
        return None
    bodies = []
    for part in found:
        name = Markup("<h3>{}</h3>").format(part.name) if len(found) > 1 else Markup("")
        bodies.append(name + _progress(part) + _best(part) + _held_out(part))
    return Section("Searched merges", Markup("").join(bodies), findings=tuple(map(_finding, found)))


def _values(run: RunView) -> list[float | None]:
    return [finite(trial.get("value")) for trial in run.metrics["trials"]]


def _progress(run: RunView) -> Markup:
    values, best = _values(run), max if run.metrics.get("better") == "higher" else min
    reached: list[float | None] = []
    for value in values:
        known = [each for each in (value, *reached[-1:]) if each is not None]
        reached.append(best(known) if known else None)
    lines = [
        Line(list(enumerate(values)), 1, "trials", style="dots"),
        Line(list(enumerate(reached)), 0, "best so far", number(reached[-1]) if reached[-1] is not None else ""),
    ]
    chart = line_chart(
        lines,
        title=f"Score on validation data ({run.metrics.get('better')} is better)",
        x_label="trial",
        describe=f"Scores of {len(values)} trials and the best so far.",
        height=200,
    )
    return figure(chart, numbers=_trials(run.metrics["trials"]))


def _trials(trials: Sequence[Mapping[str, Any]]) -> Markup:
    names = [key for key in trials[0] if key not in ("value", "scores")]
    rows = [[str(i), *(number(t.get(n)) for n in names), number(t.get("value"))] for i, t in enumerate(trials)]
    return table(["Trial", *names, "Score"], rows)


def _best(run: RunView) -> Markup:
    start, best = run.metrics["start"], run.metrics["best"]
    rows = [[name, number(start["knobs"].get(name)), number(value)] for name, value in best["knobs"].items()]
    rows.append(["score", number(start["value"], 4), number(best["value"], 4)])
    return table(["Knob", "Start", "Best"], rows)


def _held_out(run: RunView) -> Markup:
    held = run.metrics.get("held_out") or {}
    if not held:
        return Markup("")
    rows = []
    for task, start in held["start"].items():
        best = held["best"][task]
        rows.append([task, *(f"{number(e['value'])} [{number(e['low'])}, {number(e['high'])}]" for e in (start, best))])
    return table(["Task", "Start", "Best"], rows, caption="On held-out data")


def _finding(run: RunView) -> str:
    start, best = run.metrics["start"], run.metrics["best"]
    told = ", ".join(f"{name} {number(value)}" for name, value in list(best["knobs"].items())[:4])
    more = "" if run.metrics.get("held_out") else "; no held-out data says how much of it is chance"
    return (
        f"Of {len(run.metrics['trials'])} merges the best scores {number(best['value'])}, the start "
        f"{number(start['value'])} ({told}){more}."
    )
