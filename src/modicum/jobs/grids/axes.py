"""Axes of a grid: named values, each of which sets something in the recipes of stages."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modicum.errors import RecipeError
from modicum.recipe import Data, override

SEED = "seed"
PREVIOUS, FIRST, LAST = "previous", "first", "last"  # what references call values by their place
TUNE = ".tune"  # how the coordinate of a value's variants ends
WORD = re.compile(r"[\w.+=-]([\w .+=,-]*[\w.+=-])?")  # what may stand in the name of a file


@dataclass(frozen=True)
class Value:
    """A value of an axis.

    Attributes:
        sets: From paths in a recipe to what is set there.
        variants: Knobs among which the grid chooses, by their names; empty where there is nothing to choose.
    """

    sets: Mapping[str, Any]
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_axes(given: Mapping[str, Any]) -> dict[str, dict[str, Value]]:
    """Return the axes of a recipe.

    Args:
        given: For each axis its values: ``{NAME: {PATH: VALUE, …}}``, with ``tune: {PATH: [VALUE, …]}`` among the
            paths where knobs are chosen; or ``{PATH: [VALUE, …]}``, which names the values by themselves.

    Raises:
        RecipeError: An axis or a value has no name that can be part of a file's, or a value is no mapping.

    Example:
        >>> read_axes({"scale": {"method.scale": [0.5, 1.0]}})["scale"]["0.5"].sets
        {'method.scale': 0.5}
    """
    found: dict[str, dict[str, Value]] = {}
    for axis, values in given.items():
        where = f"axes.{axis}"
        if axis == SEED:
            raise RecipeError("axes.seed: seeds have a key of their own. Write seeds: [0, 1, 2].")
        _check_name(where, axis)
        if axis.endswith(TUNE):
            raise RecipeError(f"{where}: {axis!r} is what references call the knobs of an axis. Rename it.")
        if not isinstance(values, Mapping) or not values:
            raise RecipeError(f"{where} is {values!r:.60}, expected values by name: {{NAME: {{path: value}}}}.")
        listed = [(path, value) for path, value in values.items() if isinstance(value, list)]
        if listed:
            if len(values) > 1:
                raise RecipeError(f"{where}: a path with a list of values stands alone. Use names for several paths.")
            path, items = listed[0]
            found[axis] = {told(item): Value({path: item}) for item in items}
            if len(found[axis]) < len(items):
                raise RecipeError(f"{where}: a value stands twice in {items!r:.60}. Drop one.")
        else:
            found[axis] = {str(name): _value(f"{where}.{name}", value) for name, value in values.items()}
        seen: dict[str, str] = {}
        for name in found[axis]:
            _check_name(f"{where}.{name}", name)
            if name in (PREVIOUS, FIRST, LAST):
                raise RecipeError(f"{where}: {name!r} is what references call a value by its place. Rename it.")
            same = seen.setdefault(name.strip().casefold(), name)
            if same != name:
                raise RecipeError(f"{where}: the names {same!r} and {name!r} are one. Rename one of them.")
    return found


def _value(where: str, given: Any) -> Value:
    if given is None:
        return Value({})
    if not isinstance(given, Mapping):
        raise RecipeError(f"{where} is {given!r:.60}, expected {{path: value}}, such as {{data.path: rows.jsonl}}.")
    tune = given.get("tune") or {}
    if not isinstance(tune, Mapping) or not all(isinstance(v, list) and v for v in tune.values()):
        raise RecipeError(f"{where}.tune is {tune!r:.60}, expected {{path: [value, …]}}.")
    return Value({key: item for key, item in given.items() if key != "tune"}, dict(_variants(where, tune)))


def _variants(where: str, tune: Mapping[str, list[Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every combination of the knobs, named by the last part of each path."""
    if not tune:
        return
    short = [path.rpartition(".")[2] for path in tune]
    names = short if len(set(short)) == len(short) else list(tune)
    seen = set()
    for items in itertools.product(*tune.values()):
        name = " ".join(f"{key}={told(item)}" for key, item in zip(names, items))
        if name in seen:
            raise RecipeError(f"{where}.tune: {name} stands twice. Drop one.")
        seen.add(name)
        yield name, dict(zip(tune, items))


def told(item: Any) -> str:
    """Return a value as a name.

    Example:
        >>> told(0.5), told({"name": "ties", "density": 0.2}), told(True)
        ('0.5', 'name=ties,density=0.2', 'true')
    """
    if isinstance(item, Mapping):
        return ",".join(f"{key}={told(value)}" for key, value in item.items())
    if isinstance(item, list | tuple):
        return ",".join(map(told, item))
    return item.replace("/", "-").replace(":", "-") if isinstance(item, str) else json.dumps(item)


def _check_name(where: str, name: object) -> None:
    if not isinstance(name, str) or name.startswith(".") or not WORD.fullmatch(name):
        raise RecipeError(f"{where}: {name!r} is no name, expected letters, digits, spaces within, and . - _ + = ,")


def of_stage(sets: Mapping[str, Any], stage: str, keys: Collection[str], stages: Collection[str]) -> dict[str, Any]:
    """Return the settings of a value that concern one stage, by paths in its recipe.

    A path that begins with the name of a stage holds for that stage alone; any other one for the stages whose recipes
    can have its first key.

    Args:
        sets: From paths to values.
        stage: Name of the stage.
        keys: Which its recipe can have.
        stages: Names of all stages.

    Example:
        >>> of_stage({"method.scale": 1.0, "test.level": 0.9}, "test", ["level"], ["merged", "test"])
        {'level': 0.9}
    """
    found = {}
    for path, value in sets.items():
        first, dot, rest = path.partition(".")
        if dot and first in stages:
            if first == stage:
                found[rest] = value
        elif first in keys:
            found[path] = value
    return found


def apply(recipe: Data, sets: Mapping[str, Any]) -> Data:
    """Return a recipe with some paths set.

    Raises:
        RecipeError: A path leads through what is no mapping.

    Example:
        >>> apply({"method": {"name": "ties"}}, {"method.density": 0.2})
        {'method': {'name': 'ties', 'density': 0.2}}
    """
    return override(_apart(recipe), [f"{path}={json.dumps(value)}" for path, value in sets.items()])


def _apart(value: Any) -> Any:
    """Return a copy in which nothing stands in two places, as what YAML's aliases (``*name``) make does."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value
