"""One self-contained page that tells what came of one or several runs.

:func:`write` reads run folders (see :mod:`modicum.record`) and writes ``report.html``: no script, no network, light and
dark. What it shows is decided by the functions in :mod:`modicum.report.sections`, each of which draws what it
recognises in a record; a new kind of result needs a new file there and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

MARK = b'name="generator" content="modicum"'  # by which a page is known as one of ours

__all__ = ["print_summary", "terminal_table", "write"]


def write(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Write the report of ``runs`` and return its path; equal runs give equal bytes.

    Args:
        runs: Run folders; finished, failed and still running ones all do.
        out: The file to write, or a folder for ``report.html``. Left out, the report of a single run lies in its
            folder, that of several in the first one's.

    Raises:
        CheckpointError: A folder is no run, the report cannot be written, or something else than a report lies there.
    """
    from modicum.borders import check_name, check_plain
    from modicum.durable import write_atomic
    from modicum.errors import CheckpointError
    from modicum.report.page import render
    from modicum.report.runs import load

    root = load(runs)
    path = out or Path(runs[0])
    check_name(path)
    try:
        if path.is_dir() or not path.suffix:
            path = path / "report.html"
        check_plain(path, "Choose another --out.")
        if path.exists() and not _is_report(path):
            raise CheckpointError(f"{path} is no report of modicum's, so it is not overwritten. Choose another --out.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, render(root))
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror}. Choose another --out.") from None
    return path


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return MARK in file.read(1000)


def terminal_table(record: Mapping[str, Any]) -> Table:
    """Return the closing table of an evaluation for the terminal: models × tasks, the best of each task in bold.

    Raises:
        CheckpointError: The record holds no evaluation results.
    """
    from modicum.report.terminal import table

    return table(record)


def print_summary(folder: Path) -> None:
    """Print what came of the run in ``folder``: the table of its last evaluation, what it made, and how long it took.

    Raises:
        CheckpointError: ``folder`` is no run.
    """
    from modicum.report.terminal import summarize

    summarize(folder)
