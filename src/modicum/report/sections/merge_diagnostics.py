"""What a merge's method chose, and what diagnostics measured: spectra, interference, outliers, losses of the cast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from modicum.report.charts import Line, finite, line_chart
from modicum.report.html import figure, grid, table
from modicum.report.layers import LayerMap, mean
from modicum.report.runs import RunView
from modicum.report.sections import Section, section
from modicum.report.sections.merging import MOST_MAPS, maps, read_series
from modicum.report.text import measure, number, phrase

LOSSY = 0.9  # share of changed entries; below it a result of more precision is worth its size


class Picture(NamedTuple):
    """How a measurement is drawn."""

    key: str
    title: str
    what: str
    caption: str
    center: float | None = None
    warm: str = "low"


PICTURES = (
    Picture(
        "energy_ranks",
        "In how many directions did each expert move?",
        "directions that hold nine tenths of the squared difference",
        "The fewest singular directions that hold nine tenths of the squared norm of the difference from the base.",
    ),
    Picture(
        "interference",
        "Where do the experts' directions interfere?",
        "singular task interference",
        "Singular task interference (STI): 0 where the experts' leading directions are at right angles; it grows with "
        "the size of the differences.",
    ),
    Picture(
        "outliers",
        "Where are outliers?",
        "share of the magnitudes that lies in outliers",
        "Share of the sum of magnitudes in entries beyond three standard deviations. Normally distributed differences "
        "have about 3 %.",
    ),
    Picture(
        "ranks",
        "How many directions were kept?",
        "singular vectors kept",
        "Singular vectors that each expert contributes to the merge.",
    ),
    Picture(
        "weights",
        "How much does each expert count?",
        "weight of the expert",
        "The factor on each expert's singular values; 1 is neutral.",
        center=1.0,
    ),
    Picture(
        "kept",
        "What did the cut-off keep?",
        "share of the directions kept",
        "Share of the experts' directions that whitening keeps; it drops those that nearly coincide.",
    ),
    Picture(
        "survival",
        "What survives being stored?",
        "share of changed entries that are still changed after the cast",
        "Of the entries that the merge changed, those that still differ from the base in the result's precision.",
    ),
)


@section(order=31)
def merge_diagnostics(run: RunView) -> Section | None:
    """Draw what is recorded of every merge beyond its experts."""
    found = [(part.name, known) for part in run.walk() if (known := _known(part.metrics.get("diagnostics")))]
    if not found:
        return None
    parts: list[Markup] = []
    findings: list[Markup] = []
    seen: set[str] = set()  # merges of the same experts share their diagnostics, which are drawn once
    for name, diagnostics in found:
        names = [str(tensor) for tensor in diagnostics["names"]]
        if len(found) > 1:
            parts.append(Markup("<h3>{}</h3>").format(name))
        for picture in (None, *PICTURES):
            known = read_series(diagnostics.get(picture.key if picture else "spectra"))
            if not known or repr(known) in seen:
                continue
            seen.add(repr(known))
            where, series = _present(names, known)
            parts.append(maps(where, series, mean, **_words(picture)) if picture else _spectra(where, series))
        shares = read_series(diagnostics.get("survival")).values()
        survivors = [share for values in shares for share in map(finite, values) if share is not None]
        if survivors and mean(survivors) < LOSSY:
            findings.append(
                Markup("{} loses changes in storing: {} of the changed entries survive the cast. Set dtype: float32.")
                .format(name, measure(mean(survivors), "share"))
            )  # fmt: skip
    body = Markup("").join(parts)
    return Section("What the merge did", body, findings=tuple(findings)) if body else None


def _known(raw: object) -> Mapping[str, Any] | None:
    return raw if isinstance(raw, Mapping) and isinstance(raw.get("names"), list) and raw["names"] else None


def _present(names: Sequence[str], series: Mapping[str, Sequence[Any]]) -> tuple[LayerMap, dict[str, list[Any]]]:
    """Leave out the tensors of which nothing is known, such as vectors where only matrices were measured."""
    kept = [
        i for i in range(len(names)) if any(i < len(values) and values[i] is not None for values in series.values())
    ]
    chosen = {name: [values[i] if i < len(values) else None for i in kept] for name, values in series.items()}
    return LayerMap([names[i] for i in kept]), chosen


def _words(picture: Picture) -> dict[str, Any]:
    return {key: value for key, value in picture._asdict().items() if key != "key"}


def _spectra(where: LayerMap, spectra: Mapping[str, Sequence[Any]]) -> Markup:
    """Draw each expert's leading singular values beside the largest, a line for each kind of module."""
    if len(spectra) > MOST_MAPS:
        return Markup("")
    pictures, numbers = [], []
    for expert, values in spectra.items():
        curves = _curves(where, values)
        if not curves:
            continue
        lines = [
            Line([(float(i + 1), y) for i, y in enumerate(curve)], color, label, number(curve[-1], 2))
            for color, (label, curve) in enumerate(curves.items())
        ]
        pictures.append(
            line_chart(
                lines,
                title=str(expert),
                x_label="singular value",
                describe=f"Leading singular values of {expert}'s differences beside the largest, for {phrase(curves)}.",
                height=180,
                from_zero=True,
            )
        )
        longest = max(map(len, curves.values()))
        rows = [[label, *map(number, curve), *[None] * (longest - len(curve))] for label, curve in curves.items()]
        numbers.append(table([str(expert), *(str(i + 1) for i in range(longest))], rows, style="small"))
    if not pictures:
        return Markup("")
    caption = "Singular values of the difference from the base, beside the largest, on average over the layers."
    return Markup("<h3>How fast do the spectra fall?</h3>") + figure(
        grid(pictures, wide=True), caption=caption, numbers=Markup("").join(numbers)
    )


def _curves(where: LayerMap, values: Sequence[object]) -> dict[str, list[float]]:
    """Return for each kind of module the mean over its matrices of the singular values beside the largest."""
    labels = dict(zip(where.kinds, where.labels, strict=True))
    found: dict[str, list[list[float]]] = {}
    for place, spectrum in zip(where.places, values, strict=False):
        known = [v for v in map(finite, spectrum) if v is not None] if isinstance(spectrum, list) else []
        if place and known and known[0] > 0:
            found.setdefault(labels[place[1]], []).append([value / known[0] for value in known])
    return {
        label: [mean(column) for column in zip(*rows, strict=False)]
        for label, rows in found.items()
    }  # fmt: skip
