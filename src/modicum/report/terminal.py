"""The end of a run in the terminal: the closing table, and what there is to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from modicum.errors import CheckpointError, printable
from modicum.report.evaluations import Board, boards, evaluations
from modicum.report.runs import RunView, load
from modicum.report.text import duration, measure, plain


def table(record: Mapping[str, Any]) -> Table:
    """Return models × tasks of one record; see :func:`modicum.report.terminal_table`."""
    found = boards(_metrics(record.get("metrics")))
    if not found:
        raise CheckpointError(
            "This record holds no evaluation results, expected metrics with 'cells'. Report another run."
        )
    return _table(found)


def summarize(folder: Path, console: Console | None = None) -> None:
    """Print what came of the run in ``folder``."""
    console = console or Console(highlight=False)
    run = load([folder])
    found = boards(evaluations(run))
    if found:
        # At its own width, also where the window is narrower: a column that is squeezed out would be the models' names.
        shown, endless = _table(found), console.options.update(width=10_000)
        whole = endless.update(width=max(console.width, console.measure(shown, options=endless).maximum))
        console.print(Segments(console.render(shown, whole)), soft_wrap=True, end="")
    for name, path in _made(run):
        console.print(f"[dim]{_shown(name)}[/dim]  {_shown(path)}", soft_wrap=True)
    took = f"{_shown(run.status)} in {duration(run.record.get('seconds'))}"
    console.print(f"[dim]{took}[/dim]  {_shown(str(folder))}", soft_wrap=True)


def _shown(text: str) -> str:
    """Return untrusted text as it may stand in markup for the terminal."""
    return escape(printable(text))


def _made(run: RunView) -> Iterator[tuple[str, str]]:
    for part in (run,) if run.job == "grid" else run.walk():  # a grid's cells are too many to be listed
        outputs = part.record.get("outputs")
        for name, path in outputs.items() if isinstance(outputs, Mapping) else ():
            label = str(name) if part is run else f"{part.name}/{name}"
            yield label, str(part.folder / str(path))


def _metrics(raw: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the metrics themselves and, since a pipeline keeps one mapping per stage, those one level below."""
    if isinstance(raw, Mapping):
        yield "", raw
        yield from ((str(name), value) for name, value in raw.items() if isinstance(value, Mapping))


def _table(found: list[Board]) -> Table:
    result = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 3, 0, 0))
    result.add_column("model", no_wrap=True)
    columns: list[tuple[Board, Mapping[str, float], str | None]] = []
    for board in found:
        label = f"{printable(plain(board.metric))}{' ↓' if board.better == 'lower' else ''}"
        columns += [(board, board.column(task), task) for task in board.tasks]
        headers = [f"{printable(task)}\n{label}" for task in board.tasks]
        if len(board.tasks) > 1:
            columns += [(board, board.means, None), (board, board.worst_tasks, None)]
            headers += [f"mean\n{label}", f"worst task\n{label}"]
        for header in headers:
            result.add_column(Text(header), justify="right", no_wrap=True)
    for model in dict.fromkeys(model for board in found for model in board.models):
        result.add_row(Text(printable(model)), *(_cell(board, model, values, task) for board, values, task in columns))
    return result


def _cell(board: Board, model: str, values: Mapping[str, float], task: str | None) -> Text:
    if model not in values:
        return Text("–", style="dim")
    text = Text(measure(values[model], board.unit), style="bold" if model in board.best(values) else "")
    cell = board.cells.get((model, task)) if task is not None else None
    if cell and cell.low is not None and cell.high is not None:
        # Intervals of shares are not symmetric, so ± stands for half their width.
        text.append(f" ± {measure((cell.high - cell.low) / 2, board.unit)}", style="not bold dim")
    return text
