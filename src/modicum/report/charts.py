"""Pictures as plain HTML and SVG, so that they take the page's colors, fonts and width.

Lines and cells are SVG stretched to whatever width there is; text is HTML placed beside them in per cent, so that it
keeps its size on a phone and in print. Every picture stands beside a table of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from modicum.report.axes import Point, log_ticks, spread, thin, ticks
from modicum.report.text import axis, is_number, number

COLORS = 8  # how many series colors the style sheet knows
UNITS = 1000  # side of the square in which SVG is drawn before it is stretched
LABEL_HEIGHT = 17  # pixels between two labels beside a line chart


@dataclass(frozen=True)
class Line:
    """One series of a line chart. ``label`` is written where the line ends."""

    points: Sequence[Point]
    color: int = 0
    label: str = ""
    value: str = ""
    style: str = "solid"  # solid, thin, faint or dots
    band: Sequence[Point] = ()  # the outline of an area behind the line, once around


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    describe: str,
    height: int = 240,
    log: bool = False,
    from_zero: bool = False,
    whole: bool = True,
) -> Markup:
    """Draw series over a common axis, each labelled at its end.

    Args:
        lines: The series, drawn in this order.
        title: What the vertical axis shows; it stands above the picture.
        x_label: What the horizontal axis shows.
        describe: The picture in words, for those who do not see it.
        height: Height in pixels; the width is what there is.
        log: Use a logarithmic vertical axis.
        from_zero: Let the vertical axis begin at zero.
        whole: Write whole numbers alone along the horizontal axis, as of steps.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return Markup("")
    x_low, x_high = _extent(x for line in lines for x, _ in line.points)
    y_low, y_high = _extent(y for line in lines for _, y in (*line.points, *line.band) if y is not None)
    if log:
        y_ticks = log_ticks(y_low, y_high)
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    else:
        marks = ticks(min(0.0, y_low) if from_zero else y_low, y_high, 4)
        y_low, y_high = marks[0], max(y_high, marks[1])
        y_ticks = [mark for mark in marks if mark <= y_high]
    x_low = 0.0 if 0 < x_low < x_high / 10 else x_low
    x_ticks = [x for x in ticks(x_low, x_high, 5, whole=whole) if x_low <= x <= x_high]
    position = (
        (lambda y: math.log(y / y_low) / math.log(y_high / y_low))
        if log
        else (lambda y: (y - y_low) / ((y_high - y_low) or 1))
    )

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - x_low) / ((x_high - x_low) or 1), 1 - position(y)

    grid = Markup("").join(
        Markup('<line class="rule" x1="0" x2="{0}" y1="{1}" y2="{1}"/>').format(UNITS, _unit(1 - position(y)))
        for y in y_ticks
    )
    drawn = Markup("").join(
        [_fill(line, place) for line in lines if line.band] + [_draw(line, place) for line in lines]
    )
    return Markup(
        '<div class="chart{labelled}" style="--labels:{gutter}ch">'
        '<p class="axis-title">{title}</p>'
        '<div class="plot" role="img" aria-label="{describe}" style="height:{height}px">'
        '<svg viewBox="0 0 {units} {units}" preserveAspectRatio="none" aria-hidden="true">{grid}{drawn}</svg>'
        "{y_axis}{x_axis}</div>{labels}"
        '<p class="axis-title x">{x_label}</p></div>'
    ).format(
        labelled=" labelled" if any(line.label for line in lines) else "",
        gutter=max((round(0.8 * len(line.label + line.value)) + 4 for line in lines if line.label), default=1),
        title=title,
        describe=describe,
        height=height,
        units=UNITS,
        grid=grid,
        drawn=drawn,
        y_axis=Markup("").join(
            Markup('<span class="y" style="top:{:.1f}%">{}</span>').format(100 * (1 - position(y)), text)
            for y, text in zip(y_ticks, [number(y, 2) for y in y_ticks] if log else axis(y_ticks), strict=True)
        ),
        x_axis=Markup("").join(
            Markup('<span class="x" style="left:{:.1f}%">{}</span>').format(100 * place(x, y_high)[0], text)
            for x, text in zip(x_ticks, axis(x_ticks), strict=True)
        ),
        labels=_end_labels(lines, place, height),
        x_label=x_label,
    )


def _draw(line: Line, place: Callable[[float, float], tuple[float, float]]) -> Markup:
    path = []
    begin = True
    for x, y in thin(line.points) if line.style != "dots" else line.points:
        if y is None:
            begin = True
            continue
        u, v = (_unit(part) for part in place(x, y))
        # A line of no length with round ends is a dot that keeps its shape when the picture is stretched.
        path.append(f"M{u} {v}h0" if line.style == "dots" else f"{'M' if begin else 'L'}{u} {v}")
        begin = False
    return Markup('<path class="{} c{}" d="{}"/>').format(line.style, line.color % COLORS, "".join(path))


def _fill(line: Line, place: Callable[[float, float], tuple[float, float]]) -> Markup:
    corners = [place(x, y) for x, y in line.band if y is not None]
    path = "L".join(f"{_unit(u)} {_unit(v)}" for u, v in corners)
    return Markup('<path class="band c{}" d="M{}Z"/>').format(line.color % COLORS, path)


def _end_labels(lines: Sequence[Line], place: Callable[[float, float], tuple[float, float]], height: int) -> Markup:
    """Write each label as near the end of its line as its neighbours allow."""
    wanted = []
    for line in lines:
        if line.label:
            x, y = next((x, y) for x, y in reversed(line.points) if y is not None)
            wanted.append((place(x, y)[1] * height, line))
    if not wanted:
        return Markup("")
    wanted.sort(key=lambda item: item[0])
    tops = spread([top for top, _ in wanted], LABEL_HEIGHT, height)
    return Markup('<ul class="labels">{}</ul>').format(
        Markup("").join(
            Markup('<li class="c{}" style="top:{:.0f}px"><span>{}</span> <b>{}</b></li>').format(
                line.color % COLORS, top, line.label, line.value
            )
            for top, (_, line) in zip(tops, wanted, strict=True)
        )
    )


@dataclass(frozen=True)
class Scale:
    """How a heat map turns numbers into ink: from ``low`` to ``high``, or both ways from ``center``."""

    low: float
    high: float
    center: float | None = None
    warm: str = "low"  # the side of the center that is drawn in the warning color

    @classmethod
    def of(cls, values: Iterable[float | None], *, center: float | None = None, warm: str = "low") -> Scale:
        """Return the scale that just holds ``values``."""
        low, high = _extent(value for value in values if value is not None)
        if center is None:
            return cls(min(low, 0.0) if low >= 0 else low, high)
        reach = max(abs(low - center), abs(high - center)) or 1.0
        return cls(center - reach, center + reach, center, warm)

    def ink(self, value: float) -> tuple[str, float]:
        """Return the class of the color and its strength from 0 to 1."""
        if self.center is None:
            return "cool", min(1.0, max(0.0, (value - self.low) / ((self.high - self.low) or 1)))
        side = "low" if value < self.center else "high"
        return "warm" if side == self.warm else "cool", min(1.0, abs(value - self.center) / (self.high - self.center))

    def legend(self, what: str) -> Markup:
        """Draw the scale itself."""
        return Markup(
            '<p class="scale{}"><span>{}</span> <i aria-hidden="true"></i> <span>{}</span> <em>{}</em></p>'
        ).format(
            f" warm-{self.warm}" if self.center is not None else "", number(self.low, 2), number(self.high, 2), what
        )


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    title: str,
    describe: str,
    scale: Scale,
    x_label: str = "",
    every: int = 5,
) -> Markup:
    """Draw a matrix as cells; a missing value stays empty. Pointing at a cell shows its number.

    Args:
        rows: Names of the rows.
        columns: Names of the columns; every ``every``-th is written.
        values: One sequence per row.
        title: Stands above the picture.
        describe: The picture in words.
        scale: Shared by pictures that are to be compared.
        x_label: What the columns are.
        every: Distance between two column names.
    """
    cells = []
    for r, row in enumerate(values):
        for c, value in enumerate(row):
            if value is None:
                continue
            kind, strength = scale.ink(value)
            cells.append(
                Markup(
                    '<rect class="{}" x="{}" y="{}" width="1" height="1" fill-opacity="{:.2f}">'
                    "<title>{} · {} {}: {}</title></rect>"
                ).format(kind, c, r, 0.03 + 0.97 * strength, rows[r], x_label, columns[c], number(value))
            )
    names = Markup("").join(Markup("<span>{}</span>").format(row) for row in rows)
    labels = Markup("").join(
        Markup('<span class="x" style="left:{:.2f}%">{}</span>').format(100 * (c + 0.5) / len(columns), column)
        for c, column in enumerate(columns)
        if c % every == 0
    )
    return Markup(
        '<div class="heat"><p class="axis-title">{}</p><div class="rows" aria-hidden="true">{}</div>'
        '<div class="plot" role="img" aria-label="{}" style="height:{}px">'
        '<svg viewBox="0 0 {} {}" preserveAspectRatio="none">{}</svg>{}</div>'
        '<p class="axis-title x">{}</p></div>'
    ).format(title, names, describe, 18 * len(rows), len(columns), len(rows), Markup("").join(cells), labels, x_label)


def finite(value: object) -> float | None:
    """Return a finite number or nothing."""
    return float(value) if is_number(value) else None


def _unit(part: float) -> int:
    return round(UNITS * part)


def _extent(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 1.0)
