"""What a merge met: how far each expert moved from the base, layer by layer, and whether the experts agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from markupsafe import Markup

from modicum.report.charts import Line, Scale, finite, heat_map, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.layers import Combine, LayerMap, mean, norm
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.text import measure, number, phrase, plural

Series: TypeAlias = Mapping[str, Sequence[Any]]

MOST_MAPS = 6  # pictures of one kind; with more experts or pairs, one picture shows a row for each

RELATIONS = (  # what a mean cosine below the limit means
    (-0.1, "pull against each other"),
    (0.1, "are nearly orthogonal"),
    (0.5, "overlap in part"),
    (math.inf, "largely agree"),
)


@section(order=30)
def merging(run: RunView) -> Section | None:
    """Draw the layers of every merge; merges of the same experts are drawn once."""
    groups: dict[str, tuple[Mapping[str, Any], list[str]]] = {}
    for part in run.walk():
        layers = part.metrics.get("layers")
        if isinstance(layers, Mapping) and layers.get("names"):
            groups.setdefault(repr(layers), (layers, []))[1].append(part.name)
    if not groups:
        return None
    parts = []
    findings: list[Markup] = []
    stats: list[Stat] = []
    for layers, runs in groups.values():
        where, norms, cosines, conflicts, untouched = _read(layers)
        title = Markup("<h3>{}</h3>").format(phrase(runs)) if len(groups) > 1 else ""
        remark = Markup('<p class="key">{}</p>').format(_left_out(untouched)) if untouched else ""
        parts.append(Markup("{}{}{}{}{}{}").format(title, *_pictures(where, norms, cosines, conflicts), remark))
        known = [v for values in cosines.values() for v in map(finite, values) if v is not None]
        if known:
            findings.append(_finding(mean(known)))
            stats.append(Stat("Mean cosine", number(mean(known), 2), phrase(runs)))
    return Section("Inside the merge", Markup("").join(parts), findings=tuple(findings), stats=tuple(stats))


def _read(layers: Mapping[str, Any]) -> tuple[LayerMap, Series, Series, Series, int]:
    """Take the series out of a record, without tensors that no expert changed; return also how many those are."""
    names = [str(name) for name in layers["names"]] if isinstance(layers["names"], list) else []
    norms, cosines, conflicts = (read_series(layers.get(key)) for key in ("norms", "cosines", "conflict"))
    if not norms:
        return LayerMap(names), norms, cosines, conflicts, 0

    def moved(expert: str, index: int) -> bool:
        return expert not in norms or _at(norms[expert], index) != 0

    kept = [i for i in range(len(names)) if any(moved(expert, i) for expert in norms)]
    # A difference of zero has no direction, so its cosine says nothing.
    meaningful = {
        pair: [_at(values, i) if all(moved(expert, i) for expert in pair.split("|")) else None for i in kept]
        for pair, values in cosines.items()
    }
    where = LayerMap([names[i] for i in kept])
    return where, _only(kept, norms), meaningful, _only(kept, conflicts), len(names) - len(kept)


def _only(kept: Sequence[int], found: Series) -> Series:
    return {name: [_at(values, i) for i in kept] for name, values in found.items()}


def _left_out(count: int) -> str:
    return f"{plural(count, 'tensor')} that no expert changed {'is' if count == 1 else 'are'} left out."


def _pictures(
    where: LayerMap,
    norms: Series,
    cosines: Series,
    conflicts: Series,
) -> tuple[Markup, Markup, Markup, Markup]:
    chance = 1 - 2.0 ** (1 - max(2, len(norms)))
    return (
        _moved(where, norms) if where.layers and norms else Markup(""),
        maps(
            where,
            cosines,
            mean,
            title="Do the experts agree?",
            what="cosine between the experts' differences from the base",
            caption="Cosine of two experts' differences from the base, per weight matrix. Near zero they changed "
            "different things; below zero they pull against each other.",
            center=0.0,
        ),
        maps(
            where,
            conflicts,
            mean,
            title="Where do their signs conflict?",
            what="share of entries on which the signs differ",
            caption=f"Among the entries that several experts changed. Changes without any relation would give "
            f"{measure(chance, 'share')}.",
            center=chance,
            warm="high",
        ),
        _outside(where, norms, cosines),
    )


def _moved(where: LayerMap, norms: Series) -> Markup:
    """Draw the norm of each expert's difference: a line over the layers, and a map of the matrices."""
    lines = []
    for color, (expert, values) in enumerate(norms.items()):
        by_layer = where.by_layer(values, norm)
        lines.append(
            Line(_points(where, by_layer), color, expert, number(norm([v for v in by_layer if v is not None])))
        )
    picture = line_chart(
        lines,
        title="Norm of the difference from the base",
        x_label="layer",
        describe="Norm of each expert's difference from the base by layer. "
        + " ".join(f"{line.label}: {line.value} over all layers." for line in lines),
        from_zero=True,
    )
    numbers = table(
        ["Layer", *norms],
        zip(
            map(str, where.layers),
            *([number(v) for v in where.by_layer(values, norm)] for values in norms.values()),
            strict=True,
        ),
    )
    caption = "Each layer's matrices taken together; beside each line, the norm over all layers."
    return Markup("<h3>How far did each expert move?</h3>{}{}").format(
        figure(picture, caption=caption, numbers=numbers),
        maps(where, norms, norm, title="", what="norm of the difference", caption="The same, per weight matrix."),
    )


def maps(
    where: LayerMap,
    series: Series,
    combine: Combine,
    *,
    title: str,
    what: str,
    caption: str,
    center: float | None = None,
    warm: str = "low",
) -> Markup:
    """Draw module × layer for each series, or series × layer when there are many."""
    if not series or not where.layers:
        return Markup("")
    columns = [str(layer) for layer in where.layers]
    every = next(step for step in (1, 5, 10, 20, 50, 1000) if len(columns) / step <= 10)
    if len(series) <= MOST_MAPS:
        matrices = {name: where.matrix(values, combine) for name, values in series.items()}
        rows = where.labels
    else:
        matrices = {
            "mean over the matrices of a layer": [where.by_layer(values, combine) for values in series.values()]
        }
        rows = [_pair(name) for name in series]
    scale = Scale.of((v for matrix in matrices.values() for row in matrix for v in row), center=center, warm=warm)
    pictures = [
        heat_map(
            rows,
            columns,
            matrix,
            title=_pair(name),
            describe=f"{_pair(name)}: {what}, {plural(len(rows), 'row')} by {plural(len(columns), 'layer')}.",
            scale=scale,
            x_label="layer",
            every=every,
        )
        for name, matrix in matrices.items()
    ]
    numbers = Markup("").join(
        table(
            [_pair(name), *columns],
            ([row, *map(number, values)] for row, values in zip(rows, matrix, strict=True)),
            style="small",
        )
        for name, matrix in matrices.items()
    )
    heading = Markup("<h3>{}</h3>").format(title) if title else Markup("")
    return heading + figure(grid(pictures, wide=True), scale.legend(what), caption=caption, numbers=numbers)


def _outside(where: LayerMap, norms: Series, cosines: Series) -> Markup:
    columns = {f"norm, {name}": values for name, values in norms.items()}
    columns |= {f"cosine, {_pair(name)}": values for name, values in cosines.items()}
    # With many experts the table would be wider than any page; the record holds the numbers.
    if not where.outside or not columns or len(columns) > 2 * MOST_MAPS:
        return Markup("")
    rows = ([where.names[i], *(number(_at(values, i)) for values in columns.values())] for i in where.outside)
    return Markup("<h3>Outside the layers</h3>") + table(["Tensor", *columns], rows)


def _finding(cosine: float) -> Markup:
    """Say in words how the experts relate, and the figure that this rests on."""
    words = next(text for limit, text in RELATIONS if cosine < limit)
    return Markup("The experts' changes {}: their mean cosine is {}.").format(words, number(cosine, 2))


def read_series(raw: object) -> dict[str, Sequence[Any]]:
    """Accept one list or a list per name; what is neither is nothing to draw."""
    if isinstance(raw, Mapping):
        return {str(name): values for name, values in raw.items() if isinstance(values, (list, tuple))}
    return {"all experts": raw} if isinstance(raw, (list, tuple)) and raw else {}


def _points(where: LayerMap, values: Sequence[float | None]) -> list[tuple[float, float | None]]:
    return [(float(layer), value) for layer, value in zip(where.layers, values, strict=True)]


def _pair(name: str) -> str:
    return name.replace("|", " and ")


def _at(values: Sequence[Any], index: int) -> Any:
    return values[index] if index < len(values) else None
