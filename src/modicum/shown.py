"""What `modicum list` and `show` print, fitted to the terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from modicum import recipe, registry
from modicum.knobs import documentation, explanations, plain
from modicum.schema import fields

if TYPE_CHECKING:
    from pydantic import BaseModel

    from modicum.registry import Entry

# The keys under which the methods of a table stand in recipes, by job. A test compares them with the schemas.
PLACES: Mapping[str, Mapping[str, str]] = {
    "merge_methods": {"merge": "method", "route": "average"},
    "expert_stores": {"route": "store"},
    "averagers": {"average": "method", "train": "average.snapshots.method"},
    "gradient_rules": {"train": "gradient"},
    "objectives": {"train": "objective"},
    "adapter_inits": {"train": "adapter.init"},
    "zeroth_order": {"train": "optimizer"},
    "policies": {"coordinate": "policies"},
    "attacks": {"attack": "suites.attack", "represent": "suites.attack"},
    "models": {"train": "model.convert"},
    "measures": {"evaluate": "tasks"},
}


def show_names(tables: Mapping[str, Mapping[str, str]], width: int | None) -> None:
    """Print the names of each table with what they stand for; a width wraps the lines, ``None`` leaves them whole."""
    for kind, members in tables.items():
        print(f"{kind}:")
        for name, summary in members.items():
            line = f"  {name:<22} {summary}".rstrip()
            print("\n".join(_wrapped(line, 0, width, hang=25)) if width and len(line) > width else line)


def show_entry(entry: Entry[Any], kind: str) -> None:
    """Print a method: what it does, where it stands in a recipe, its knobs, and what else is to be known."""
    console = Console(highlight=False)
    paper = f" · {entry.paper}" if entry.paper else ""
    console.print(f"[bold]{entry.name}[/bold] · {entry.noun}{paper}")
    summary, _, rest = plain(documentation(entry.function)).partition("\n\n")
    console.print(f"{' '.join(summary.split())}\n", markup=False)
    if entry.noun == registry.job.noun:
        _show_job(console, entry)
        return
    if kind in PLACES:
        told = [f"the key {key} of the job {job}" for job, key in PLACES[kind].items()]
        console.print(f"In a recipe: {' · '.join(told)}\n", markup=False)
    said: dict[str, str] = {}
    for source in (*entry.facts.further, entry.function):
        said |= explanations(source)
    _tell(console, entry.schema, "knob", {name: plain(text) for name, text in said.items()})
    console.print()
    for line in fitted(_without(rest, entry.schema.model_fields).rstrip(), console.width):
        console.print(line, markup=False, soft_wrap=True)
    if entry.laws:
        console.print("\nLaws, each checked by a generated test:")
        for law in sorted(entry.laws):
            for line in _wrapped(f"{law}: {entry.facts.known_laws[law]}", 4, console.width):
                console.print(line, markup=False, soft_wrap=True)


def _show_job(console: Console, entry: Entry[Any]) -> None:
    schema = recipe.job_schema(entry.name)
    _tell(console, schema, "key")
    console.print("\nA method is written as its name, or as {name: …, knob: value}: modicum list", markup=False)
    for section, keys in recipe.sections(schema).items():
        console.print(f"\n{', '.join(keys)}: {plain(section.__doc__ or '').partition(chr(10))[0]}", markup=False)
        _tell(console, section, "key")


def _tell(console: Console, schema: type[BaseModel], first: str, said: Mapping[str, str] | None = None) -> None:
    """Print a table of the fields of a schema; where there is little room, each meaning stands below its field."""
    known = said or {}
    rows = [(name, kind, default, known.get(name) or meaning) for name, kind, default, meaning in fields(schema)]
    if not rows:
        console.print(f"no {first}s")
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in (first, "type", "default", ""):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    longest = [max(len(row[i]) for row in rows) for i in range(3)]
    if console.width - sum(longest) - 6 >= MEANING:
        console.print(table)
        return
    for name, kind, default, meaning in rows:
        told = default if default == "required" else f"default: {default}"
        for line in _wrapped(f"{name}  {kind}  ({told})", 0, console.width):
            console.print(line, markup=False, soft_wrap=True)
        for line in _wrapped(meaning, 4, console.width):
            console.print(line, markup=False, soft_wrap=True)


MEANING = 36  # columns that a table must leave for what a field means


def _without(text: str, names: Mapping[str, Any]) -> str:
    """Return a docstring in Google's style without the arguments that the table of knobs explains."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n|\n(?=    ))+)", text, re.MULTILINE)
    if section is None:
        return text
    items = re.split(r"^    (?=\w+:)", section.group(1), flags=re.MULTILINE)[1:]
    kept = "".join(f"    {item}" for item in items if item.partition(":")[0] not in names)
    start, end = section.span(1) if kept else section.span()
    return text[:start] + kept + text[end:].lstrip("\n" if not kept else "")


def fitted(text: str, width: int) -> Iterator[str]:
    """Yield the lines of a docstring in Google's style, each paragraph and item wrapped to a width.

    Formulas and examples stay as they are.
    """
    section, open_item = "", ""
    for line in [*text.splitlines(), ""]:
        depth = len(line) - len(line.lstrip())
        heading = depth == 0 and re.fullmatch(r"[A-Z]\w+:", line)
        as_it_is = section == "Example" or (not section and depth > 0)
        new_item = section in ("Args", "Attributes", "Raises") and depth == 4
        if open_item and (not line or heading or as_it_is or new_item):
            yield from _wrapped(open_item.strip(), len(open_item) - len(open_item.lstrip()), width)
            open_item = ""
        if heading:
            section = line[:-1]
        if not line or heading or as_it_is:
            yield line
        else:
            open_item = f"{open_item} {line.strip()}" if open_item else line


def _wrapped(text: str, indent: int, width: int, hang: int | None = None) -> list[str]:
    """Return the lines of a text; those after the first stand further in where it begins with a name."""
    if hang is None:
        hang = indent + 4 if re.match(r"\w+: ", text) else indent
    return textwrap.wrap(
        text,
        max(width, 40),
        initial_indent=" " * indent,
        subsequent_indent=" " * hang,
        break_long_words=False,
        break_on_hyphens=False,
    )
