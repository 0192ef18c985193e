"""Train, fine-tune, merge and align language models with less compute than you would like.

Everything modicum does is written in a recipe, a short YAML file. Start with: `modicum run quickstart`

Exit status: 0 done, 2 the input is wrong (one line says what), 130 interrupted, 1 anything else.
"""

from __future__ import annotations

import atexit
import errno
import gc
import json
import os
import shlex
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from modicum import names, processes
from modicum.errors import ModicumError, RecipeError, did_you_mean, printable, shortened
from modicum.shortage import shortage_told

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # whatever is wrong with the arguments themselves


class _Commands(TyperGroup):
    """The commands; who names a recipe or a method in the place of one is told which command takes it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name.startswith("-") or name in self.commands:
            return super().resolve_command(ctx, args)
        raise UsageError(f"There is no command {name!r}. {names.instead(name, self.commands)}", ctx)


app = typer.Typer(
    name="modicum",
    cls=_Commands,
    help=__doc__,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from modicum import __version__

        print(f"modicum {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version, and exit.")
    ] = False,
) -> None:
    pass


Source = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        autocompletion=names.recipes_like,
        help="A YAML file (mergekit's too), a shipped recipe's name, or the folder of a run, which goes on.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="A.B=C", help="Change a value: `-s trainer.max_steps=10`. Repeatable."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="DIR", help="Run folder; else runs/RECIPE.")]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN", help="Run folders.")]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]


def _load(source: str, assignments: list[str] | None, out: Path | None) -> tuple[Any, Path]:
    """Return a recipe and the folder of its run."""
    from modicum.recipe import is_run, override, parse, read

    recipe = parse(override(read(source), assignments or []), source)
    known = source if is_run(source) else recipe.out or f"runs/{Path(source).stem}"
    return recipe, out or Path(known)


@contextmanager
def _paths_explained(source: str, recipe: Any) -> Iterator[None]:
    """Say of a failure that a path of the recipe is not here, but beside the recipe, where that is so."""
    try:
        yield
    except ModicumError as error:
        place = Path(source).parent
        for name in recipe.inputs() if Path(source).is_file() else ():
            # The operating system's own functions: a name that no file can have is simply not there.
            if not os.path.exists(name) and os.path.exists(place / name):  # noqa: PTH110
                told = f"{name} lies beside {source}, and paths start from where the command is run: run it in {place}."
                raise RecipeError(f"{error} {told}") from error
        raise


@app.command()
def run(
    source: Source,
    assignments: Set = None,
    out: Out = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    on: Annotated[
        str | None, typer.Option("--on", metavar="WHERE", help="Where stages run: local, ray, slurm.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", "-w", metavar="N", help="Stages that run at a time.")
    ] = None,
    traceback: Traceback = False,  # noqa: ARG001 - read by main, which catches the error
) -> None:
    """Run a recipe. Started again after any interruption, it goes on where it stopped.

    Paths in a recipe start from where the command is run.

    For example:

    - `modicum run quickstart`
    - `modicum run merge.yaml --out merged -s method=tsv`
    - `modicum run train.yaml -s trainer.max_steps=10 -s 'data={path: rows.jsonl, size: 100}'`
    - `modicum run runs/train`: go on with what is in that folder
    """
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    from modicum import shortened
    from modicum.jobs import execute

    shortened.install()
    recipe, folder = _load(source, assignments, out)
    with _paths_explained(source, recipe):
        finished = execute(recipe, folder, quiet=quiet, on=on, workers=workers)
    if not finished.quiet:
        from modicum.report import print_summary

        print_summary(finished.folder)
        finished.say(f"A page about it: modicum report {shlex.quote(str(finished.folder))}")


@app.command()
def check(
    source: Source,
    assignments: Set = None,
    out: Out = None,
    traceback: Traceback = False,  # noqa: ARG001
) -> None:
    """Check a recipe and print its plan: what would be read, computed and written. Runs nothing.

    Prints the recipe with everything that is left out filled in; `modicum show JOB` explains its keys.

    For example:

    - `modicum check quickstart`
    - `modicum check merge.yaml -s method.density=0.3`
    """
    import yaml

    from modicum.jobs import plan
    from modicum.recipe import dump

    recipe, folder = _load(source, assignments, out)
    with _paths_explained(source, recipe):
        lines = plan(recipe, folder)
    print(yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True).rstrip())
    print("\n".join(["", "plan:", *(f"  {printable(line)}" for line in lines)]) if lines else "")
    print(f"{printable(source)} is valid.", file=sys.stderr)


@app.command(name="list")
def list_(
    kind: Annotated[
        str | None,
        typer.Argument(
            metavar="KIND", autocompletion=names.kinds_like, help="One kind only, such as merge_methods or recipes."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the names as JSON.")] = False,
) -> None:
    """List every method, job and recipe. `modicum show NAME` tells more about one.

    For example:

    - `modicum list`
    - `modicum list recipes`
    - `modicum list merge_methods --json`
    """
    from modicum.shown import show_names

    found = names.tables()
    if kind is not None:
        if kind not in found:
            known = next((title for title, members in found.items() if kind in members), None)
            hint = did_you_mean(kind, found) if known is None else f"It is one of {known}: modicum show {kind}"
            raise RecipeError(f"There is no kind {kind!r}. {hint}")
        found = {kind: found[kind]}
    if as_json:
        print(json.dumps({title: list(members) for title, members in found.items()}, indent=2))
        return
    # What reads a pipe wants a line for each; a terminal would break them in the midst of words.
    show_names(found, shutil.get_terminal_size().columns if sys.stdout.isatty() else None)


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", autocompletion=names.names_like, help="A method, job or recipe, as `modicum list` names it."
        ),
    ],
) -> None:
    """Show what a method does and its knobs, a job's keys, or a shipped recipe's text.

    For example:

    - `modicum show ties`
    - `modicum show train`
    - `modicum show quickstart > mine.yaml`: a copy to change
    """
    from modicum import recipe, registry
    from modicum.shown import show_entry

    tables = names.tables()
    kinds = [kind for kind, members in tables.items() if name in members]
    if not kinds:
        hint = did_you_mean(name, {member for members in tables.values() for member in members})
        hint = hint if hint.startswith("Did") else "See: modicum list"
        if name in tables:
            hint = f"It is a kind: modicum list {name}"
        raise RecipeError(f"There is nothing called {name!r}. {hint}")
    for position, kind in enumerate(kinds):
        if position:
            print()
        if kind == "recipes":
            print(recipe.shipped_text(name).rstrip())
        else:
            show_entry(registry.REGISTRIES[kind][name], kind)


@app.command()
def verify(runs: Runs, traceback: Traceback = False) -> None:  # noqa: ARG001
    """Read every output of finished runs again, and compare it with what their records say.

    For example: `modicum verify runs/quickstart`. The exit status is 2 where something was changed or lost.
    """
    from modicum.errors import CheckpointError
    from modicum.stored import read_record, verify

    for folder in runs:
        status = read_record(folder).get("status")
        if status != "done":
            raise CheckpointError(f"{folder} is {status}, not done. Run its recipe again to finish it.")
        found = verify(folder)
        damaged = {**found.damaged, **_damaged_checkpoints(folder)}
        if damaged:
            told = ", ".join(f"{name} {problem}" for name, problem in list(damaged.items())[:5])
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            raise CheckpointError(f"{folder}: {told}{more}. Run its recipe again to make it anew.")
        print(f"{folder}: {found.files} files, {found.nbytes / 1e6:.1f} MB, all as the record says")


def _damaged_checkpoints(folder: Path) -> dict[str, str]:
    from modicum.jobs.training.checkpoints import checkpoints, trouble

    found = {}
    for place in (folder, *sorted(folder.glob("stages/*"))):
        for path in checkpoints(place / "checkpoints"):
            if (why := trouble(path)) is not None:
                found[str(path.relative_to(folder))] = f"is not whole ({why})"
    return found


@app.command()
def report(
    runs: Runs,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="The page; else report.html in the first run's folder."),
    ] = None,
    traceback: Traceback = False,  # noqa: ARG001
) -> None:
    """Write one self-contained HTML page about one or several runs, and print its path.

    For example:

    - `modicum report runs/quickstart`
    - `modicum report runs/first runs/second --out both.html`
    """
    from modicum.report import write

    print(write(runs, out))


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


def _of_the_system(error: OSError) -> str:
    """Say in one line what the system refused, and what to do."""
    place = str(error.filename or "a file of the run")
    place = place if len(place) < 300 else f"{place[:297]}..."
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{place}: no space is left on its disk. Free some, and run the same command again to go on."
    return f"{place}: {error.strerror or error}. Check the path and its permissions."


def _say(text: str) -> None:
    """Print one line about what went wrong: several are put after each other, and none may steer the terminal.

    Logs of schedulers keep it: what looks like a key is hidden, as in records.
    """
    from modicum.credentials import redact

    text = printable(redact(shortened(" ".join(text.split("\n")))))
    print(f"modicum: {text}", file=sys.stderr)


def _say_usage(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    known = getattr(error, "possibilities", None)  # of an option that there is none of
    told = f"{error.message}. {did_you_mean(error.option_name, known)}" if known else error.format_message()
    path = "modicum" if error.ctx is None else error.ctx.command_path
    _say(f"{told if told.endswith(('.', '?')) else told + '.'} See: {path} --help")


def main() -> None:
    """Run the command line: exit status 0 done, 2 wrong input (one line), 1 anything else."""
    processes.end_with_launcher()  # at once: it may be killed while this one still imports
    # Importing torch makes objects that all stay: looking through them again and again is a tenth of every start.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # they go with the process, which would look through them once more as it ends
    processes.hush_libraries()
    warnings.showwarning = lambda message, *_: _say(f"warning: {message}")
    signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's way to say Ctrl-C: the run's record tells of it
    try:
        with shortage_told("Free some, or lower what the recipe asks for."):
            status = app(standalone_mode=False, prog_name="modicum")
        if status == 130:  # what typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
        raise SystemExit(status)
    except KeyboardInterrupt:
        _say("interrupted; run the same command again to go on.")
        raise SystemExit(130) from None
    except UsageError as error:
        _say_usage(error)
        raise SystemExit(2) from None
    except ModicumError as error:
        if "--traceback" in sys.argv:
            raise
        _say(str(error))
        raise SystemExit(2) from None
    except OSError as error:
        if "--traceback" in sys.argv or error.errno is None:
            raise
        _say(_of_the_system(error))
        raise SystemExit(2) from None
    except Exception as error:
        if "--traceback" in sys.argv:
            raise
        _say(f"{type(error).__name__}: {error} (--traceback shows where)")
        raise SystemExit(1) from None
