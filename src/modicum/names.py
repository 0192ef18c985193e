"""Every name that the command line takes: what each stands for, and which begin with what was typed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from modicum.errors import did_you_mean

YAML = (".yaml", ".yml")


def tables() -> dict[str, dict[str, str]]:
    """Return the names of every kind, each with the line that says what it is; imports no method."""
    from modicum.knobs import plain
    from modicum.recipe import shipped, shipped_text
    from modicum.registry import REGISTRIES

    recipes = {name: shipped_text(name).partition("\n")[0].lstrip("# ") for name in shipped()}
    found = {kind: table.summaries() for kind, table in REGISTRIES.items()} | {"recipes": recipes}
    return {kind: {name: plain(said) for name, said in members.items()} for kind, members in found.items()}


def instead(name: str, commands: Iterable[str]) -> str:
    """Return a sentence about what may have been meant by a command that there is none of."""
    hint = did_you_mean(name, commands)
    if hint.startswith("Did"):
        return hint
    known = tables()
    if name in known["recipes"] or Path(name).suffix in YAML:
        return f"Did you mean: modicum run {name}?"
    return f"Did you mean: modicum show {name}?" if any(name in members for members in known.values()) else hint


def recipes_like(begun: str) -> list[str]:
    """Return what a shell may offer in the place of a recipe: shipped ones, YAML files, and folders on the way."""
    from modicum.recipe import shipped

    place, slash, start = begun.rpartition("/")
    folder = Path(place or slash or ".")
    found = sorted(path for path in folder.iterdir() if path.name.startswith(start)) if folder.is_dir() else []
    files = [f"{path}/" if path.is_dir() else str(path) for path in found if path.is_dir() or path.suffix in YAML]
    return [name for name in shipped() if name.startswith(begun)] + files


def kinds_like(begun: str) -> list[str]:
    """Return the kinds of which a shell may offer one."""
    return [kind for kind in tables() if kind.startswith(begun)]


def names_like(begun: str) -> list[str]:
    """Return the methods, jobs and recipes of which a shell may offer one."""
    return sorted({name for members in tables().values() for name in members if name.startswith(begun)})
