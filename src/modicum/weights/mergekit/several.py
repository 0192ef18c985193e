"""Several mergekit documents in one file, which may merge what others of them make: stages of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from modicum.errors import RecipeError
from modicum.weights.mergekit.document import Data

LAST = "final"  # the stage of the document without a name
REFERENCES = ("model", "base_model", "tokenizer_source", "source", "lora")  # keys whose values may name a model


def stages_of(documents: Sequence[Data]) -> list[dict[str, Any]]:
    """Return the stages of a pipeline, each after those whose results it merges; the one without a name at the end.

    Args:
        documents: mergekit documents; all but one have a ``name``, by which the others call its result.

    Raises:
        RecipeError: Names are missing or stand twice, or documents need each other in a circle.

    Example:
        >>> linear = {"merge_method": "linear", "models": []}
        >>> [stage["name"] for stage in stages_of([linear | {"base_model": "x"}, linear | {"name": "x"}])]
        ['x', 'final']
    """
    named: dict[str, Data] = {}
    for document in documents:
        name = str(document.get("name") or "")
        if name in named:
            what = f"are called {name!r}" if name else "have no name"
            raise RecipeError(f"Two documents of the file {what}. Name each, but one at most.")
        named[name] = document
    stages = dict(zip(named, _stage_names(named)))
    ordered: dict[str, dict[str, Any]] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise RecipeError(f"The documents {' → '.join((*above, name))} need each other in a circle.")
        if name not in ordered:
            used: list[str] = []
            made = _replaced(named[name], stages, used)
            for other in used:
                visit(other, (*above, name))
            ordered[name] = {**made, "name": stages[name]}

    for name in (*filter(None, named), *([""] if "" in named else [])):
        visit(name, ())
    return list(ordered.values())


def _stage_names(names: Mapping[str, Any]) -> list[str]:
    """Return names that folders may have, one for each, all different."""
    found: list[str] = []
    for name in names:
        made = re.sub(r"[^\w-]+", "-", name) or LAST
        while made in found:
            made += "-"
        found.append(made)
    return found


def _replaced(value: Any, stages: Mapping[str, str], used: list[str], key: str = "") -> Any:
    """Return a document in which the names of others stand for their stages, and collect these names."""
    if isinstance(value, Mapping):
        # `path` is a model in a reference that is written as a mapping.
        return {k: _replaced(v, stages, used, key if k == "path" else k) for k, v in value.items()}
    if isinstance(value, list):
        return [_replaced(item, stages, used, key) for item in value]
    if not isinstance(value, str) or key not in REFERENCES:
        return value
    parts = value.split("+")
    used += [part for part in parts if part in stages and part]
    return "+".join(f"stage:{stages[part]}" if part and part in stages else part for part in parts)
