"""Results: how well each model did on each task, with intervals."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from modicum.report.axes import ticks
from modicum.report.evaluations import Board, Cell, boards, evaluations
from modicum.report.html import figure, grid, table
from modicum.report.runs import RunView
from modicum.report.sections import Section, Stat, section
from modicum.report.text import MISSING, duration, measure, number, phrase, plain, plural

LONG_NAME = 16  # characters; longer ones need wider panels
READ_BARS = "Bars show the value, the thin line its confidence interval. The best model of a task is colored."


@section(order=10)
def results(run: RunView) -> Section | None:
    """Draw the results of every evaluation among the runs."""
    found = boards(evaluations(run))
    if not found:
        return None
    body = Markup("").join(
        Markup("<h3>{}</h3>{}{}").format(
            f"{plain(board.metric).capitalize()}{', lower is better' if board.better == 'lower' else ''}",
            heat_table(board),
            figure(
                grid((_panel(board, task) for task in board.tasks), wide=max(map(len, board.models)) > LONG_NAME),
                caption=READ_BARS,
                numbers=_numbers(board),
            ),
        )
        for board in found
    )
    first = found[0]
    return Section(
        "Results", body, findings=tuple(_finding(board) for board in found if _tells(board)), stats=_stats(first)
    )


def heat_table(board: Board) -> Markup:
    """Draw models × tasks; the ink follows the rank within the column."""
    columns: list[tuple[str, Mapping[str, float]]] = [(task, board.column(task)) for task in board.tasks]
    if len(board.tasks) > 1:
        columns += [("Mean", board.means), ("Worst task", board.worst_tasks)]
    head = Markup("").join(
        Markup('<th scope="col" class="number{}">{}</th>').format(" total" if i >= len(board.tasks) else "", name)
        for i, (name, _) in enumerate(columns)
    )
    rows = Markup("").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            model,
            Markup("").join(
                _heat_cell(board, model, values, total=i >= len(board.tasks)) for i, (_, values) in enumerate(columns)
            ),
        )
        for model in board.models
    )
    key = Markup(
        '<p class="key"><span class="best-mark">best</span><span class="worst-mark">worst</span> of the column</p>'
    )
    return Markup(
        '<div class="scroll"><table class="heat-table"><thead><tr><th scope="col">Model</th>{}</tr></thead>'
        "<tbody>{}</tbody></table></div>{}"
    ).format(head, rows, key if board.better else "")


def _heat_cell(board: Board, model: str, values: Mapping[str, float], *, total: bool) -> Markup:
    value = values.get(model)
    if value is None:
        return Markup('<td class="number">{}</td>').format(MISSING)
    low, high = min(values.values()), max(values.values())
    rank = (value - low) / (high - low) if high > low else 0.5
    rank = {"higher": rank, "lower": 1 - rank}.get(board.better or "", 0.5)
    mark = "best" if model in board.best(values) else "worst" if model in board.worst(values) else ""
    return Markup('<td class="number heat{}{}" style="--t:{:.2f}"><span class="{}">{}{}</span></td>').format(
        " strong" if rank > 0.75 else "",
        " total" if total else "",
        rank,
        f"{mark}-mark" if mark else "",
        measure(value, board.unit),
        Markup('<span class="unseen"> ({} of the column)</span>').format(mark) if mark else "",
    )


def _panel(board: Board, task: str) -> Markup:
    cells = [cell for model in board.models if (cell := board.cells.get((model, task)))]
    best = board.best({cell.model: cell.value for cell in cells})
    reach = max(max(cell.value, cell.high or cell.value) for cell in cells)
    # Shares are drawn on the whole scale unless all are small, so that panels can be compared at a glance.
    top = 1.0 if board.unit == "share" and reach > 0.4 else ticks(0.0, max(reach, 0.0), 4)[-1]
    sizes = sorted({cell.n for cell in cells if cell.n is not None})
    rows = Markup("").join(_bar(board, cell, top, best=cell.model in best) for cell in cells)
    return Markup('<table class="bars"><caption>{}<span>{}</span></caption><tbody>{}</tbody></table>').format(
        task, f"n = {phrase([number(n) for n in sizes])}" if sizes else "", rows
    )


def _bar(board: Board, cell: Cell, top: float, *, best: bool) -> Markup:
    def place(value: float) -> float:
        return 100 * min(1.0, max(0.0, value / top))

    whisker = Markup("")
    interval = ""
    if cell.low is not None and cell.high is not None:
        left, right = place(cell.low), place(cell.high)
        whisker = Markup('<b style="left:{:.2f}%;width:{:.2f}%"></b>').format(left, right - left)
        interval = f"{measure(cell.low, cell.metric.unit)} to {measure(cell.high, cell.metric.unit)}"
    return Markup(
        '<tr{}><th scope="row" title="{}">{}</th><td class="bar"><div><i style="width:{:.2f}%"></i>{}</div></td>'
        '<td class="number" title="{}">{}</td></tr>'
    ).format(
        Markup(' class="best"') if best else "",
        cell.model,
        cell.model,
        place(cell.value),
        whisker,
        interval,
        measure(cell.value, board.unit),
    )


def _numbers(board: Board) -> Markup:
    return table(
        ["Model", "Task", "Value", "Low", "High", "n", "Time"],
        (
            [
                cell.model,
                cell.task,
                *(measure(value, cell.metric.unit) for value in (cell.value, cell.low, cell.high)),
                number(cell.n),
                duration(cell.seconds),
            ]
            for cell in board.cells.values()
        ),
        texts=2,
    )


def _tells(board: Board) -> bool:
    return len(board.models) > 1 and bool(board.best(_overall(board)))


def _overall(board: Board) -> Mapping[str, float]:
    return board.means if len(board.tasks) > 1 else board.column(board.tasks[0])


def _finding(board: Board) -> Markup:
    overall = _overall(board)
    best = [model for model in board.models if model in board.best(overall)]
    base = _baseline(board, overall)
    where = f"on average over {plural(len(board.tasks), 'task')}" if len(board.tasks) > 1 else f"on {board.tasks[0]}"
    sentence = Markup("<b>{}</b> {} best {}: {} {}{}.").format(
        phrase(best),
        "does" if len(best) == 1 else "do",
        where,
        plain(board.metric),
        measure(overall[best[0]], board.unit),
        f", {base} {measure(overall[base], board.unit)}" if base and base not in best else "",
    )
    close = _overlapping(board, best[0]) if len(best) == 1 else []
    if close:
        sentence += Markup(" On every task its interval overlaps that of {}, so the lead may be chance.").format(
            phrase(close)
        )
    return sentence


def _baseline(board: Board, overall: Mapping[str, float]) -> str | None:
    """Return the model that the others started from, as far as its name tells."""
    return next((model for model in board.models if model.lower().startswith("base") and model in overall), None)


def _overlapping(board: Board, best: str) -> list[str]:
    """Return the models whose interval overlaps that of the best one on every task."""

    def overlap(model: str, task: str) -> bool:
        a, b = board.cells.get((best, task)), board.cells.get((model, task))
        if not a or not b or a.low is None or a.high is None or b.low is None or b.high is None:
            return False
        return a.low <= b.high and b.low <= a.high

    return [m for m in board.models if m != best and all(overlap(m, task) for task in board.tasks)]


def _stats(board: Board) -> tuple[Stat, ...]:
    overall = _overall(board)
    if not overall or board.better is None:
        return ()
    pick = min if board.better == "lower" else max
    best = pick(overall, key=lambda model: overall[model])
    metric = plain(board.metric)
    label = "Best on average" if len(board.tasks) > 1 else f"Best on {board.tasks[0]}"
    stats = [Stat(label, measure(overall[best], board.unit), f"{best}, {metric}")]
    if len(board.tasks) > 1:
        safest = pick(board.worst_tasks, key=lambda model: board.worst_tasks[model])
        stats.append(Stat("Best worst task", measure(board.worst_tasks[safest], board.unit), safest))
    base = _baseline(board, overall)
    if base and base != best:
        stats.append(Stat("Before", measure(overall[base], board.unit), base))
    return tuple(stats)
