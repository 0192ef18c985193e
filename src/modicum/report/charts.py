"""Pictures as plain HTML and SVG, so that they take the page's colours, fonts and width.

Lines and cells are SVG stretched to whatever width there is; text is HTML placed beside them in per cent, so that it
keeps its size on a phone and in print. Every picture stands beside a table of its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from modicum.report.text import MISSING, is_number, number

COLORS = 8  # how many series colours the style sheet knows
UNITS = 1000  # side of the square in which SVG is drawn before it is stretched
MOST_POINTS = 400  # per line; more than a screen can show only makes the page heavy
LABEL_HEIGHT = 17  # pixels between two labels beside a line chart

Point = tuple[float, float | None]  # None where the value is missing or not finite: the line breaks there


@dataclass(frozen=True)
class Line:
    """One series of a line chart. ``label`` is written where the line ends."""

    points: Sequence[Point]
    color: int = 0
    label: str = ""
    value: str = ""
    style: str = "solid"  # solid, faint or dots


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    describe: str,
    height: int = 240,
    log: bool = False,
    from_zero: bool = False,
    tick: Callable[[float], str] = number,
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
        tick: Writes a number beside the vertical axis.
    """
    lines = [line for line in lines if any(y is not None for _, y in line.points)]
    if not lines:
        return Markup("")
    x_low, x_high = _extent(x for line in lines for x, _ in line.points)
    y_low, y_high = _extent(y for line in lines for _, y in line.points if y is not None)
    if log:
        y_ticks = log_ticks(y_low, y_high)
        y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    else:
        marks = ticks(min(0.0, y_low) if from_zero else y_low, y_high, 4)
        y_low, y_high = marks[0], max(y_high, marks[1])
        y_ticks = [mark for mark in marks if mark <= y_high]
    x_low = 0.0 if 0 < x_low < x_high / 10 else x_low
    x_ticks = [x for x in ticks(x_low, x_high, 5, whole=True) if x_low <= x <= x_high]
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
    drawn = Markup("").join(_draw(line, place) for line in lines)
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
            Markup('<span class="y" style="top:{:.1f}%">{}</span>').format(100 * (1 - position(y)), tick(y))
            for y in y_ticks
        ),
        x_axis=Markup("").join(
            Markup('<span class="x" style="left:{:.1f}%">{}</span>').format(100 * place(x, y_high)[0], number(x))
            for x in x_ticks
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
    """How a heat map turns numbers into ink: from ``low`` to ``high``, or both ways from zero."""

    low: float
    high: float
    diverging: bool = False

    @classmethod
    def of(cls, values: Iterable[float | None], *, diverging: bool = False) -> Scale:
        """Return the scale that just holds ``values``."""
        low, high = _extent(value for value in values if value is not None)
        reach = max(abs(low), abs(high)) or 1.0
        return cls(-reach, reach, True) if diverging else cls(min(low, 0.0) if low >= 0 else low, high)

    def ink(self, value: float) -> tuple[str, float]:
        """Return the class of the colour and its strength from 0 to 1."""
        if self.diverging:
            return "minus" if value < 0 else "plus", min(1.0, abs(value) / self.high)
        return "plus", min(1.0, max(0.0, (value - self.low) / ((self.high - self.low) or 1)))

    def legend(self, what: str) -> Markup:
        """Draw the scale itself."""
        return Markup(
            '<p class="scale{}"><span>{}</span> <i aria-hidden="true"></i> <span>{}</span> <em>{}</em></p>'
        ).format(" diverging" if self.diverging else "", number(self.low, 2), number(self.high, 2), what)


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


def table(
    headers: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    caption: str = "",
    texts: int = 1,
    style: str = "",
) -> Markup:
    """Draw a table; the first ``texts`` columns are text, the rest numbers."""
    head = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(_align(column, texts), header)
        for column, header in enumerate(headers)
    )
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup('<th scope="row">{}</th>').format(cell)
                if column == 0
                else Markup("<td{}>{}</td>").format(_align(column, texts), MISSING if cell is None else cell)
                for column, cell in enumerate(row)
            )
        )
        for row in rows
    )
    return Markup(
        '<div class="scroll"><table class="{}">{}<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>'
    ).format(style, Markup("<caption>{}</caption>").format(caption) if caption else "", head, body)


def _align(column: int, texts: int) -> Markup:
    return Markup(' class="number"') if column >= texts else Markup("")


def fold(summary: str, body: Markup) -> Markup:
    """Put ``body`` behind a line that opens it."""
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, body)


def figure(*parts: Markup, caption: str | Markup = "", numbers: Markup | None = None) -> Markup:
    """Put pictures, a sentence on how to read them and their numbers together."""
    return Markup("<figure>{}{}{}</figure>").format(
        Markup("").join(parts),
        Markup("<figcaption>{}</figcaption>").format(caption) if caption else "",
        fold("Numbers", numbers) if numbers is not None else "",
    )


def grid(parts: Iterable[Markup], *, wide: bool = False) -> Markup:
    """Set small pictures side by side where there is room."""
    return Markup('<div class="grid{}">{}</div>').format(" wide" if wide else "", Markup("").join(parts))


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Return round numbers that enclose ``low`` and ``high``, about ``count`` of them.

    Example:
        >>> ticks(0.13, 2.4, 4)
        [0.0, 1.0, 2.0, 3.0]
        >>> ticks(1, 30, 5, whole=True)
        [0.0, 10.0, 20.0, 30.0]
    """
    # Equal values, or values that differ only by rounding, still need an axis of some length.
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 2, high + abs(high) / 2) if high else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2, 5 × powers of ten (or powers of ten alone over many decades) that enclose two positive numbers.

    Example:
        >>> log_ticks(0.3, 8)
        [0.2, 0.5, 1.0, 2.0, 5.0, 10.0]
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [round(f * 10.0**e, 15) for e in range(first, last + 1) for f in factors]
    start = max((i for i, mark in enumerate(marks) if mark <= low), default=0)
    stop = min((i for i, mark in enumerate(marks) if mark >= high), default=len(marks) - 1)
    return marks[start : max(stop, start + 1) + 1]


def thin(points: Sequence[Point]) -> list[Point]:
    """Keep the extremes of each stretch of a long series, so that no spike disappears."""
    if len(points) <= MOST_POINTS:
        return list(points)
    width = math.ceil(2 * len(points) / MOST_POINTS)
    kept: list[Point] = []
    for start in range(0, len(points), width):
        stretch = points[start : start + width]
        known = [i for i, (_, y) in enumerate(stretch) if y is not None]
        lows = (
            [min(known, key=lambda i: stretch[i][1] or 0), max(known, key=lambda i: stretch[i][1] or 0)]
            if known
            else []
        )
        gap = [i for i, (_, y) in enumerate(stretch) if y is None][:1]
        kept += [stretch[i] for i in sorted({*lows, *gap})]
    return kept


def spread(tops: Sequence[float], gap: float, height: float) -> list[float]:
    """Move sorted positions apart until neighbours keep ``gap``, as little as possible, inside ``height``.

    Example:
        >>> spread([10, 12, 100], 10, 200)
        [6.0, 16.0, 100.0]
    """

    def inside(centre: float, count: int) -> float:
        half = (count - 1) * gap / 2
        return min(max(centre, half), max(half, height - half))

    groups: list[tuple[float, int]] = []  # centre and number of labels that have been pushed together
    for top in tops:
        centre, count = inside(top, 1), 1
        while groups and groups[-1][0] + groups[-1][1] * gap / 2 > centre - count * gap / 2:
            other, others = groups.pop()
            count += others
            centre = inside((other * others + centre * (count - others)) / count, count)
        groups.append((centre, count))
    return [centre + (i - (count - 1) / 2) * gap for centre, count in groups for i in range(count)]


def finite(value: object) -> float | None:
    """Return a finite number or nothing."""
    return float(value) if is_number(value) else None


def _unit(part: float) -> int:
    return round(UNITS * part)


def _extent(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 1.0)
