"""References between recipes: ``stage:NAME`` is the first output of a stage, ``stage:NAME/OUTPUT`` that of a name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modicum.errors import ModicumError, RecipeError, did_you_mean
from modicum.record import read_record

PREFIX = "stage:"


def references(value: Any) -> Iterator[str]:
    """Yield every reference to a stage in a recipe.

    Example:
        >>> list(references({"base": "org/model", "experts": ["stage:a", "stage:b/adapter"]}))
        ['stage:a', 'stage:b/adapter']
    """
    if isinstance(value, str) and value.startswith(PREFIX):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from references(item)
    elif isinstance(value, list):
        for item in value:
            yield from references(item)


def stage_of(reference: str) -> str:
    """Return the name in a reference; of ``model+adapter``, as mergekit files write it, that in the model.

    Example:
        >>> stage_of("stage:tuned/adapter")
        'tuned'
    """
    return reference.removeprefix(PREFIX).partition("+")[0].partition("/")[0]


def names_in(value: Any) -> list[str]:
    """Return the stages that a recipe uses, each once."""
    parts = (part for text in references(value) for part in text.split("+") if part.startswith(PREFIX))
    return list(dict.fromkeys(map(stage_of, parts)))


def refuse_unmade(reference: str, made: Mapping[str, Sequence[str] | None], where: str = "") -> None:
    """Refuse a reference to what its stage does not make.

    Args:
        reference: Of a stage, or of ``model+adapter`` with one of a stage in it.
        made: Names of what each stage makes; ``None`` where nobody knows before it has run.
        where: How an error begins.

    Raises:
        RecipeError: The stage makes nothing, or nothing of that name.

    Example:
        >>> refuse_unmade("stage:a/adapter", {"a": ["adapter", "checkpoints"]})
    """
    for part in reference.split("+"):  # model+adapter, as mergekit files write it
        name, _, output = part.removeprefix(PREFIX).partition("/")
        outputs = made.get(name) if part.startswith(PREFIX) else None
        if outputs is None:
            continue
        if not outputs:
            raise RecipeError(f"{where}{part!r}: stage {name!r} makes nothing that another stage could use.")
        if output and output not in outputs:
            hint = did_you_mean(output, outputs)
            raise RecipeError(f"{where}{part!r}: stage {name!r} has no output {output!r}. {hint}")


def resolve(value: Any, folders: Mapping[str, Path]) -> Any:
    """Replace every reference to a stage by the path of what that stage made.

    Args:
        value: A recipe, or a part of one.
        folders: Where each finished stage is.

    Raises:
        RecipeError: A stage made no such output.
    """
    if isinstance(value, Mapping):
        return {key: resolve(item, folders) for key, item in value.items()}
    if isinstance(value, list):
        return [resolve(item, folders) for item in value]
    if not isinstance(value, str) or not value.startswith(PREFIX):
        return value
    value, plus, adapter = value.partition("+")  # model+adapter, as mergekit files write it
    if plus:
        return f"{resolve(value, folders)}+{resolve(adapter, folders)}"
    name, _, output = value.removeprefix(PREFIX).partition("/")
    outputs: dict[str, str] = read_record(folders[name])["outputs"]
    refuse_unmade(value, {name: list(outputs)})
    return str(folders[name] / (outputs[output] if output else next(iter(outputs.values()))))


def named(title: str, error: ModicumError) -> ModicumError:
    """Return a stage's error with its title, where it is made from its message alone."""
    plain = type(error).__init__ is Exception.__init__ or "__init__" not in vars(type(error))
    return type(error)(f"{title}: {error}") if plain else error
