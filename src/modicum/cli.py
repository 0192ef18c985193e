"""The command line: run, check, list, show, report. It is small and frozen; knobs live in recipes."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="modicum",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=__doc__,
)
