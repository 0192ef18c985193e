"""Adapter initialisations: what preheating learned, and how far training turned the directions it was given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from modicum.borders import loads
from modicum.report.charts import Line, Scale, finite, heat_map, line_chart
from modicum.report.html import figure
from modicum.report.layers import LayerMap, mean
from modicum.report.runs import RunView
from modicum.report.sections import Section, section

FILE = "adapter_geometry.json"
SIDES = {"A": "input directions (A)", "B": "output directions (B)"}
FULL = "the full fine-tune's leading directions"
ANGLES = {
    "turned": ("start and end", "White: training stayed in the directions that it was given."),
    "start": (f"the start and {FULL}", "White: the start held what the full fine-tune changed most."),
    "end": (f"the end and {FULL}", "White: the trained adapter holds what the full fine-tune changed most."),
}
RIGHT = Scale(0.0, 90.0)  # degrees: from the same space to a right angle


@section(order=24)
def adapter_start(run: RunView) -> Section | None:
    """Draw every run whose adapter was started by a method; its loss stands under Training."""
    parts: list[Markup] = []
    findings: list[Markup] = []
    for part in run.walk():
        found = _read(part)
        if found is None:
            continue
        parts += [_spectrum(part, found), *(_angles(part, found, side, kind) for side in SIDES for kind in ANGLES)]
        findings += _findings(part, found)
    body = Markup("").join(parts)
    return Section("Adapter start", body, findings=tuple(findings)) if body else None


def _read(run: RunView) -> Mapping[str, Any] | None:
    try:
        found = loads((run.folder / "adapter" / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # an adapter of another kind, or a file that was cut off
    return found if isinstance(found, dict) and isinstance(found.get("modules"), list) else None


def _values(found: Mapping[str, Any], key: str) -> list[float | None]:
    values = found.get(key)
    known = [finite(value) for value in values] if isinstance(values, list) else []
    return known if len(known) == len(found["modules"]) and any(value is not None for value in known) else []


def _spectrum(run: RunView, found: Mapping[str, Any]) -> Markup:
    shares = found.get("shares")
    if not isinstance(shares, Mapping):
        return Markup("")
    curves = {
        label: [(float(place), finite(value)) for place, value in enumerate(shares[label], start=1)]
        for label in ("least", "median", "most")
        if isinstance(shares.get(label), list)
    }
    if not any(value is not None for points in curves.values() for _, value in points):
        return Markup("")
    lines = [
        Line(points, 0, f"{label} of the modules", style="solid" if label == "median" else "thin")
        for label, points in curves.items()
    ]
    picture = line_chart(
        lines,
        title=f"Share of the preheated change in its first directions · {run.name}",
        x_label="directions",
        describe="Share of the squared singular values of the preheated product by number of directions: the median, "
        "the lowest and the highest of all modules.",
        from_zero=True,
    )
    return figure(picture, caption="The steeper the rise, the more a low rank can keep of what preheating learned.")


def _angles(run: RunView, found: Mapping[str, Any], side: str, kind: str) -> Markup:
    values = _values(found, f"{kind}_{side}")
    where = LayerMap([str(name) for name in found["modules"]])
    if not values or not where.layers:
        return Markup("")
    between, meaning = ANGLES[kind]
    picture = heat_map(
        where.labels,
        [str(layer) for layer in where.layers],
        where.matrix(values, mean),
        title=f"Degrees between {between}, {SIDES[side]} · {run.name}",
        describe=f"Mean principal angle between {between}, {SIDES[side]}, by layer and module.",
        scale=RIGHT,
        x_label="layer",
        every=max(1, len(where.layers) // 8),
    )
    return figure(picture, caption=meaning)


def _findings(run: RunView, found: Mapping[str, Any]) -> list[Markup]:
    told = []
    for side, what in SIDES.items():
        known = [value for value in _values(found, f"turned_{side}") if value is not None]
        if known:
            told.append(Markup("its {} turned by {:.0f}° on average").format(what, mean(known)))
    for side, what in SIDES.items():
        met = {
            when: [value for value in _values(found, f"{when}_{side}") if value is not None]
            for when in ("start", "end")
        }
        if met["end"]:
            before = Markup("{:.0f}° before and ").format(mean(met["start"])) if met["start"] else ""
            told.append(
                Markup("its {} lay {}{:.0f}° after training from those of the full fine-tune").format(
                    what, before, mean(met["end"])
                )
            )
    held = [value for value in _values(found, "held") if value is not None]
    if held:
        told.append(Markup("its rank held {:.0f} % of the preheated change").format(100 * mean(held)))
    if not told:
        return []
    sentence = Markup("; ").join(told)
    return [Markup("<b>{}</b>, started by {}: {}.").format(run.name, str(found.get("name", "?")), sentence)]
