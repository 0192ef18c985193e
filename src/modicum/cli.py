"""Train, fine-tune, merge and align language models with less compute than you would like.

Everything modicum does is written in a recipe, a short YAML file. Start with:  modicum run quickstart
"""

from __future__ import annotations

import atexit
import errno
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from modicum import processes
from modicum.errors import ModicumError, RecipeError, did_you_mean, printable
from modicum.shortage import shortage_told

UsageError: type[Exception] = typer.BadParameter.__bases__[0]  # whatever is wrong with the arguments themselves

app = typer.Typer(
    name="modicum",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Source = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file (mergekit's too) or a shipped recipe's name.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="A.B=C", help="Change a value: `-s trainer.max_steps=10`. Repeatable."),
]
Traceback = Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")]


def _load(source: str, assignments: list[str] | None) -> Any:
    from modicum.recipe import override, parse, read

    return parse(override(read(source), assignments or []), source)


@app.command()
def run(
    source: Source,
    assignments: Set = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<recipe>.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    on: Annotated[str | None, typer.Option("--on", help="Where stages run: local, ray or slurm.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", help="Stages that run at a time.")] = None,
    traceback: Traceback = False,  # noqa: ARG001 - read by main, which catches the error
) -> None:
    """Run a recipe. Started again after any interruption, it goes on where it stopped.

    Examples:  `modicum run quickstart` · `modicum run merge.yaml --out merged` · `modicum run train.yaml -s seed=1`
    """
    if quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when transformers is imported
    from modicum import shortened
    from modicum.jobs import execute

    shortened.install()
    recipe = _load(source, assignments)
    folder = out or Path(recipe.out or f"runs/{Path(source).stem}")
    finished = execute(recipe, folder, quiet=quiet, on=on, workers=workers)
    if not finished.quiet:
        from modicum.report import print_summary

        print_summary(finished.folder)


@app.command()
def check(
    source: Source,
    assignments: Set = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Run folder; default runs/<recipe>.")] = None,
    traceback: Traceback = False,  # noqa: ARG001
) -> None:
    """Check a recipe and print its plan: what would be read, computed and written. Runs nothing."""
    import yaml

    from modicum.jobs import plan
    from modicum.recipe import dump

    recipe = _load(source, assignments)
    lines = plan(recipe, out or Path(recipe.out or f"runs/{Path(source).stem}"))
    print(yaml.safe_dump(dump(recipe), sort_keys=False, allow_unicode=True).rstrip())
    print("\n".join(["", "plan:", *(f"  {printable(line)}" for line in lines)]) if lines else "")
    print(f"{printable(source)} is valid.", file=sys.stderr)


@app.command(name="list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="One kind only, such as merge_methods or recipes.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List every method, job and recipe. `modicum show NAME` tells more about one."""
    names = _tables()
    if kind is not None:
        if kind not in names:
            raise RecipeError(f"There is no kind {kind!r}. {did_you_mean(kind, names)}")
        names = {kind: names[kind]}
    if as_json:
        print(json.dumps({title: list(members) for title, members in names.items()}, indent=2))
        return
    for title, members in names.items():
        print(f"{title.replace('_', ' ')}:")
        for name, summary in members.items():
            print(f"  {name:<22} {summary}".rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(help="A method, job or recipe, as `modicum list` names it.")]) -> None:
    """Show what a method does and its knobs, or a shipped recipe's text.

    Examples:  `modicum show ties` · `modicum show train` · `modicum show quickstart`
    """
    from modicum import recipe, registry

    kinds = [kind for kind, members in _tables().items() if name in members]
    if not kinds:
        hint = did_you_mean(name, {member for members in _tables().values() for member in members})
        raise RecipeError(
            f"There is nothing called {name!r}. {hint if hint.startswith('Did') else 'See: modicum list'}"
        )
    for kind in kinds:
        if kind == "recipes":
            print(recipe.text_of(name))
        else:
            _show_entry(registry.REGISTRIES[kind][name])


@app.command()
def verify(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    traceback: Traceback = False,  # noqa: ARG001
) -> None:
    """Read every output of finished runs again, and compare it with what their records say."""
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
    runs: Annotated[list[Path], typer.Argument(metavar="RUN…", help="Run folders.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File; default report.html in the first run.")] = None,
    traceback: Traceback = False,  # noqa: ARG001
) -> None:
    """Write one self-contained HTML page about one or several runs."""
    from modicum.report import write

    print(write(runs, out))


def _tables() -> dict[str, dict[str, str]]:
    from modicum.knobs import plain
    from modicum.recipe import shipped, text_of
    from modicum.registry import REGISTRIES

    recipes = {name: text_of(name).partition("\n")[0].lstrip("# ") for name in shipped()}
    found = {kind: table.summaries() for kind, table in REGISTRIES.items()} | {"recipes": recipes}
    return {kind: {name: plain(said) for name, said in members.items()} for kind, members in found.items()}


def _show_entry(entry: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from modicum import recipe, registry
    from modicum.knobs import documentation, plain
    from modicum.schema import fields

    console = Console(highlight=False)

    def tell(schema: Any, first: str) -> None:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in (first, "type", "default", ""):
            table.add_column(column, overflow="fold")
        for row in fields(schema):
            table.add_row(*map(escape, row))
        console.print(table if table.rows else f"no {first}s")

    paper = f" · {entry.paper}" if entry.paper else ""
    console.print(f"[bold]{entry.name}[/bold] · {entry.noun}{paper}")
    summary, _, rest = plain(documentation(entry.function)).partition("\n\n")
    console.print(f"{summary}\n", markup=False)
    if entry.noun == registry.job.noun:
        schema = recipe.job_schema(entry.name)
        tell(schema, "key")
        console.print("\nA method is written as its name, or as {name: …, knob: value}: modicum list", markup=False)
        for section, keys in recipe.sections(schema).items():
            console.print(f"\n{', '.join(keys)}: {plain(section.__doc__ or '').partition(chr(10))[0]}", markup=False)
            tell(section, "key")
        return
    tell(entry.schema, "knob")
    console.print(f"\n{rest}", markup=False)
    if entry.laws:
        console.print("\nLaws, each checked by a generated test:")
        for law in sorted(entry.laws):
            console.print(f"    {law}: {entry.facts.known_laws[law]}", markup=False)


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

    text = printable(redact(" ".join(text.split("\n"))))
    print(f"modicum: {text if len(text) <= 4000 else text[:3997] + '...'}", file=sys.stderr)


def _say_usage(error: Any) -> None:
    if error.ctx is None or type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        _say(f"{error.format_message()} See: {error.ctx.command_path} --help")


def main() -> None:
    """Run the command line: exit status 0 done, 2 wrong input (one line), 1 anything else."""
    processes.end_with_launcher()  # at once: it may be killed while this one still imports
    # Importing torch makes objects that all stay: looking through them again and again is a tenth of every start.
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)  # they go with the process, which would look through them once more as it ends
    processes.hush_libraries()
    signal.signal(signal.SIGTERM, _interrupt)  # a scheduler's way to say Ctrl-C: the run's record tells of it
    try:
        with shortage_told("Free some, or lower what the recipe asks for."):
            status = app(standalone_mode=False)
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
