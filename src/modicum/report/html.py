"""Tables and figures: the parts of a page that are no pictures themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

from modicum.report.text import MISSING


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
