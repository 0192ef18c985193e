"""Routed models: where experts contradict each other, what their folder takes, how well prompts are told apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from modicum.report.charts import Line, Scale, finite, heat_map, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.route_points import MERGE, RoutePoint, route_points
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.sections.measurements import size
from modicum.report.text import measure, number, plain

READ = (
    "The share of contradicting signs in every layer, in the order of the model. Dots mark the layers that are kept "
    "apart for each expert; the others are averaged. Experts that know nothing of each other are at the chance level."
)
DOUBT = (
    "How unsure the router is of held-out prompts, from 0 % (one expert for certain) to 100 % (all alike). Dotted "
    "lines are tasks that no expert was trained on: where these are near 0 too, the router does not know that it does "
    "not know, and only the gate of distances helps."
)
TRADE = (
    "Every routed model and merge that was evaluated, by the bytes that its folder takes. High and left is better. "
    "Dots of one store above each other differ in which layers are kept apart or in how experts are selected. "
    "Tasks that no expert was trained on are left out."
)


@section(order=18)
def routing(run: RunView) -> Section | None:
    """Draw conflict by layer, bytes by store, how the router tells tasks apart, and quality over bytes."""
    parts, findings, stats = [], [], []
    for part in run.walk():
        if part.stages or not isinstance(part.metrics.get("routing_conflict"), Mapping):
            continue
        found = part.metrics
        parts += [_conflict(part.name, found["routing_conflict"]), _bytes(found.get("routing_bytes", {}))]
        findings.append(_finding(part.name, found))
        share = finite(found.get("routing_bytes", {}).get("share"))
        if share is not None:
            count = found["routing_bytes"].get("experts", "?")
            stats.append(Stat("bytes of the folder", measure(share, "share"), f"of {count} whole models"))
        if isinstance(found.get("distilled"), Mapping):
            parts.append(_distilled(found["distilled"]))
        if isinstance(found.get("router"), Mapping):
            parts += list(_router(found["router"]))
    if not parts:
        return None
    parts += _trades(route_points(run))
    return Section("Routed experts", Markup("").join(parts), tuple(findings), tuple(stats[:2]))


def _finding(name: str, found: Mapping[str, Any]) -> str:
    conflict = found["routing_conflict"]
    known = [d for d in map(finite, conflict.get("values", [])) if d is not None]
    text = f"{name}: {len(conflict.get('routed', []))} of {len(known)} layers are kept apart for each expert"
    accuracy = finite(found.get("router", {}).get("accuracy")) if isinstance(found.get("router"), Mapping) else None
    return (
        f"{text}." if accuracy is None else f"{text}; the router is right on {measure(accuracy, 'share')} of prompts."
    )


def _conflict(name: str, found: Mapping[str, Any]) -> Markup:
    layers, values = list(found.get("layers", [])), [finite(v) for v in found.get("values", [])]
    routed = set(found.get("routed", []))
    chance = finite(found.get("chance"))
    marks = [(i, v) for i, (layer, v) in enumerate(zip(layers, values)) if layer in routed]
    lines = [
        Line([(i, chance) for i in range(len(layers))], color=2, label="chance", style="thin") if chance else None,
        Line(list(enumerate(values)), color=0, label="conflict"),
        Line(marks, color=1, label="kept apart", style="dots") if marks else None,
    ]
    chart = line_chart(
        [line for line in lines if line],
        title=f"{name}: conflict",
        x_label="layer",
        describe=f"conflict of {len(layers)} layers, of which {len(routed)} are kept apart",
        from_zero=True,
    )
    numbers = table(
        ["Layer", "Conflict", "Kept apart"],
        ([layer, number(v), "yes" if layer in routed else "no"] for layer, v in zip(layers, values)),
    )
    return figure(chart, caption=READ, numbers=numbers)


def _bytes(found: Mapping[str, Any]) -> Markup:
    whole, count = finite(found.get("whole_model")), finite(found.get("experts"))
    if not whole or not count:
        return Markup("")
    rows = [[f"{count:.0f} whole models", size(whole * count), "100 %"]]
    for store, stored in found.get("by_store", {}).items():
        total = (finite(found.get("dense", whole)) or whole) + (finite(found.get("router")) or 0)
        chosen = " (this folder)" if store == found.get("store") else ""
        rows.append(
            [
                f"shared weights and {store}{chosen}",
                size(total + stored),
                measure((total + stored) / (whole * count), "share"),
            ]
        )
    return table(["What is kept", "Bytes", "Share"], rows, caption="The routed layers in each store")


def _distilled(found: Mapping[str, Any]) -> Markup:
    rows = [
        [str(name), *(number(error.get(key)) for key in ("before", "after"))]
        for name, error in found.items()
        if isinstance(error, Mapping)
    ]
    caption = "Mean squared error of the logits on held-out prompts: stored sizes, and fitted ones"
    return table(["Expert", "Before", "After"], rows, caption=caption)


def _trades(points: Sequence[RoutePoint]) -> Iterator[Markup]:
    """Draw quality over bytes, all stores in one picture; one for each metric."""
    for metric in dict.fromkeys(point.metric for point in points):
        own = sorted((p for p in points if p.metric == metric), key=lambda p: (p.cost.kind == MERGE, p.cost.kind))
        factor = 100 if metric.unit == "share" else 1
        lines = [
            Line(
                [(100 * p.cost.share, factor * p.quality) for p in own if p.cost.kind == kind],
                color=color,
                label=plain(kind),
                style="dots",
            )
            for color, kind in enumerate(dict.fromkeys(p.cost.kind for p in own))
        ]
        chart = line_chart(
            lines,
            title=f"{plain(metric.name)}{', %' if factor > 1 else ''}, mean of the known tasks",
            x_label="bytes, % of all experts as whole models",
            describe=f"{plain(metric.name)} over bytes of {len(own)} models, a color for each store",
            from_zero=True,
        )
        rows = [
            [p.model, p.cost.kind, measure(p.quality, metric.unit), measure(p.cost.share, "share"), str(p.cost.routed)]
            for p in sorted(own, key=lambda p: -p.quality)
        ]
        head = ["Model", "Store", plain(metric.name), "Bytes", "Layers kept apart"]
        yield figure(chart, caption=TRADE, numbers=table(head, rows, texts=2))


def _router(found: Mapping[str, Any]) -> Iterator[Markup]:
    confusion = found.get("confusion")
    if isinstance(confusion, Mapping) and confusion.get("counts"):
        names, counts = list(confusion["names"]), confusion["counts"]
        shares = [[c / max(1, sum(row)) for c in row] for row in counts]
        picture = heat_map(
            names,
            names,
            shares,
            title="Prompts of each task by the expert that the router finds likeliest",
            describe="share of each task's held-out prompts by expert",
            scale=Scale(0.0, 1.0),
            x_label="expert",
            every=1,
        )
        rows = ([a, b, str(counts[i][j])] for i, a in enumerate(names) for j, b in enumerate(names))
        yield figure(grid([picture]), numbers=table(["Task", "Expert", "Prompts"], rows, texts=2))
    doubt = found.get("uncertainty")
    if isinstance(doubt, list) and doubt:
        lines = [
            Line(
                _histogram(row["counts"]),
                color=color,
                label=str(row["task"]),
                style="solid" if row.get("known") else "dots",
            )
            for color, row in enumerate(doubt)
        ]
        chart = line_chart(
            lines,
            title="share of prompts",
            x_label="uncertainty, %",
            describe="histogram of the router's uncertainty by task",
            from_zero=True,
        )
        rows = (
            [str(row["task"]), "yes" if row.get("known") else "no", number(row.get("mean")), number(row.get("gated"))]
            for row in doubt
        )
        yield figure(chart, caption=DOUBT, numbers=table(["Task", "Known", "Mean", "Beyond the gate"], rows))


def _histogram(counts: list[int]) -> list[tuple[float, float | None]]:
    """Return the middle of every bin in per cent, and the share of prompts in it."""
    total = max(1, sum(counts))
    return [(100 * (i + 0.5) / len(counts), n / total) for i, n in enumerate(counts)]
