"""Recipes: YAML in, checked models out. Every job declares its own schema beside its code.

A recipe names its job; the job's first parameter is annotated with a subclass of :class:`Recipe`, and that class is the
schema. Methods inside a recipe are written ``{name: ties, density: 0.2}`` and are checked against their registry.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeAlias, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WrapSerializer,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo

from modicum import registry
from modicum.borders import MALFORMED
from modicum.credentials import secrets_in
from modicum.documents import LONGEST, is_mergekit, parse_documents
from modicum.documents import parse_yaml as parse_yaml
from modicum.errors import ModicumError, RecipeError, did_you_mean, first_line, is_text
from modicum.inputs import Inputs, look
from modicum.registry import Registry
from modicum.schema import Noun, classes_in, explain, not_finite
from modicum.types import NonNegativeInt

Data: TypeAlias = dict[str, Any]


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused.

    Attributes:
        noun: What errors call it.
        alone: The key that a text in the place of the whole section stands for.
        acts_with: Keys that change nothing unless another one is given: one that is set in vain is refused.
        acts_without: Keys that change nothing once another one is given.
    """

    noun: ClassVar[str] = "section"
    alone: ClassVar[str | None] = None
    acts_with: ClassVar[Mapping[str, str]] = {}
    acts_without: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, value: Any) -> Any:
        return {cls.alone: value} if cls.alone is not None and isinstance(value, str) else value

    @model_validator(mode="after")
    def _numbers_are_finite(self) -> Self:
        """Look where another library's schema begins; pydantic looks at the numbers that have a type here."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            for where, found in () if isinstance(value, BaseModel) else not_finite(value, name):
                raise ValueError(f"{where} is {found}, expected a finite number")
        return self

    @model_validator(mode="after")
    def _nothing_is_said_in_vain(self) -> Self:
        """Refuse a value of a key that will not be read; its default, which a resolved recipe holds too, may stand."""
        for table, given, remedy in (
            (self.acts_with, False, "Set {}, or remove {}"),
            (self.acts_without, True, "Remove {} or {}"),
        ):
            for key, other in table.items():
                said = getattr(self, key) != _default_of(type(self).model_fields[key])
                if said and (getattr(self, other) is not None) is given:
                    state = "is given" if given else "is not given"
                    raise ValueError(f"{key} changes nothing where {other} {state}. {remedy.format(other, key)}.")
        return self

    @model_serializer(mode="wrap")
    def _nulls_are_written(self, handler: Any) -> Data:
        """Keep the nulls that say something else than a default: without them a dump would be another recipe."""
        told: Data = handler(self)
        for name, field in type(self).model_fields.items():
            if name not in told and getattr(self, name) is None and _default_of(field) is not None:
                told[name] = None
        return told


class Recipe(Section):
    """What every job has."""

    noun: ClassVar[str] = "recipe"
    job: str
    seed: NonNegativeInt = 0
    out: str | None = Field(default=None, description="run folder; runs/<name of the recipe> when not given")

    def inputs(self) -> Iterator[str]:
        """Yield the models and files that this recipe reads; their content is part of the run's identity."""
        yield from ()


class Choice(Section):
    """A method by name, with its knobs; see :func:`choice`."""

    noun: ClassVar[str] = "method"
    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def knobs(self) -> dict[str, Any]:
        """The knobs, checked and completed."""
        return dict(self.model_extra or {})


def choice(table: Registry[..., Any], *, complete: bool = True) -> Any:
    """Return the type of a recipe field that picks a method of ``table`` and sets its knobs.

    Args:
        table: The registry to choose from.
        complete: Fill in the defaults and require what has none. ``False`` leaves the knobs unchecked, for callers
            that complete them later.

    Example:
        >>> from modicum.registry import merge_method
        >>> class R(Section):
        ...     method: choice(merge_method)
        >>> R(method={"name": "ties", "density": 0.2}).method.knobs["scale"]
        1.0
    """

    def check(value: object) -> object:
        if isinstance(value, Choice):
            return value
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise ValueError(f"expected the name of a {table.noun}, or {{name: …, knob: value}}")
        entry = table[value["name"]]
        given = {key: item for key, item in value.items() if key != "name"}
        return {"name": entry.name, **(entry.knobs(given) if complete else given)}

    def tell(value: Choice, handler: Any) -> Data:
        told: Data = handler(value)
        known = table[value.name].schema.model_fields if None in value.knobs.values() else {}
        nulls = (name for name, item in value.knobs.items() if item is None and name in known)
        return told | {name: None for name in nulls if _default_of(known[name]) is not None}

    return Annotated[Choice, BeforeValidator(check), WrapSerializer(tell), Noun(table.noun)]


def _default_of(field: FieldInfo) -> Any:
    """Return what a field is when nothing is said; something, for one that must be said."""
    return ... if field.is_required() else field.get_default(call_default_factory=True)


def sections(schema: type[Section]) -> dict[type[Section], list[str]]:
    """Return the sections of a recipe, and of its sections, with the keys that they stand under.

    Example:
        >>> {kind.__name__: keys for kind, keys in sections(job_schema("calibrate")).items()}["DataSection"]
        ['data']
    """
    found: dict[type[Section], list[str]] = {}
    left: list[tuple[str, type[Section]]] = [("", schema)]
    for place, section in left:  # which grows
        for name, field in section.model_fields.items():
            key = f"{place}{name}"
            for part in classes_in(field.annotation):
                if not issubclass(part, Section) or issubclass(part, Choice | Recipe):
                    continue
                if part not in found:
                    left.append((f"{key}.", part))
                found.setdefault(part, []).append(key)
    return found


DEEPEST = 50  # levels of a value that is set from outside


def shipped() -> list[str]:
    """Names of the recipes inside the package."""
    return sorted(p.name.removesuffix(".yaml") for p in files("modicum.recipes").iterdir() if p.name.endswith(".yaml"))


def shipped_text(name: str) -> str:
    """Return the text of a shipped recipe."""
    return files("modicum.recipes").joinpath(f"{name}.yaml").read_text(encoding="utf-8")


def is_run(source: str) -> bool:
    """Whether ``source`` is the folder of a run, and no shipped recipe's name."""
    return source not in shipped() and all(os.path.isfile(f"{source}/{name}") for name in _OF_A_RUN)  # noqa: PTH113


_OF_A_RUN = ("record.json", "recipe.yaml")


def text_of(source: str) -> str:
    """Return the text of the recipe file ``source``, of the shipped recipe of that name, or of the run in a folder."""
    source = f"{source}/recipe.yaml" if is_run(source) else source
    path = Path(source)
    if os.path.isfile(source):  # noqa: PTH113 - pathlib raises for a name that is too long
        try:
            if path.stat().st_size > LONGEST:
                raise RecipeError(f"{source} has more than {LONGEST >> 20} MiB, which is no recipe. Check the path.")
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"Cannot read {source}: {error}.") from None
    if source in shipped():
        return shipped_text(source)
    if os.path.isdir(source):  # noqa: PTH112
        raise RecipeError(
            f"{source} is a folder, expected a YAML file, a shipped recipe's name or the folder of a run."
        )
    if path.suffix in (".yaml", ".yml") or "/" in source:
        raise RecipeError(f"There is no file {source}. Check the path, or see: modicum list recipes")
    raise RecipeError(f"There is no file or shipped recipe {source!r}. {did_you_mean(source, shipped())}")


def read(source: str) -> Data:
    """Return the recipe in file ``source``, or the shipped recipe of that name, as plain data."""
    documents = parse_documents(text_of(source), source)
    if len(documents) > 1 and all(map(is_mergekit, documents)):
        return {"job": "pipeline", "documents": documents}
    data = documents[0] if len(documents) == 1 else parse_yaml(text_of(source), source)
    if not isinstance(data, dict):
        word = {type(None): "empty", list: "a list", str: "a text"}.get(type(data), f"one value, {data!r:.40}")
        raise RecipeError(f"{source} is {word}, expected a mapping that begins with 'job: …'.")
    return data


def override(data: Data, assignments: Sequence[str]) -> Data:
    """Return ``data`` with each ``a.b=c`` set; ``c`` is read as YAML, list items are addressed by position or name.

    Example:
        >>> override({"trainer": {"max_steps": 5}}, ["trainer.max_steps=10", "seed=1"])
        {'trainer': {'max_steps': 10}, 'seed': 1}
    """
    data = copy.deepcopy(data)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not key or not equals:
            raise RecipeError(f"--set {assignment}: expected key=value, for example trainer.max_steps=10.")
        *parents, last = key.split(".")
        if len(parents) > DEEPEST:
            raise RecipeError(f"--set {key[:40]}…: {len(parents)} levels, expected at most {DEEPEST}.")
        target: Any = data
        for part in parents:
            target = _descend(target, part, assignment)
        value = parse_yaml(text, f"--set {key}")
        if isinstance(target, list):
            target[_index(target, last, assignment)] = value
        elif isinstance(target, dict):
            target[last] = value
        else:
            raise RecipeError(f"--set {assignment}: {'.'.join(parents)} is {target!r}, expected a mapping.")
    return data


def _descend(target: Any, part: str, assignment: str) -> Any:
    if isinstance(target, list):
        return target[_index(target, part, assignment)]
    if isinstance(target, dict):
        return target.setdefault(part, {})
    raise RecipeError(f"--set {assignment}: cannot go into {target!r} at {part!r}, expected a mapping.")


def _index(items: list[Any], part: str, assignment: str) -> int:
    if part.isascii() and part.isdigit() and len(part) < 10 and int(part) < len(items):
        return int(part)
    for index, item in enumerate(items):
        if isinstance(item, dict) and item.get("name") == part:
            return index
    names = [item["name"] for item in items if isinstance(item, dict) and isinstance(item.get("name"), str)]
    hint = did_you_mean(part, names) if names else f"Use a position from 0 to {len(items) - 1}."
    if not items:
        hint = "Set the whole list."
    raise RecipeError(f"--set {assignment}: no item {part!r} among {len(items)}. {hint}")


def parse(data: Data, where: str = "recipe") -> Recipe:
    """Check ``data`` against the schema of its job.

    A mapping with a top-level ``merge_method`` is a mergekit file, and runs as a merge job, which tells its own keys
    from those of the file. One with ``base_model`` and ``experts`` is a file of mergekit-moe.

    Raises:
        RecipeError: A key is unknown or missing, or a value is out of range; one line for each.
    """
    if odd := next((text for text in _texts(data) if not is_text(text)), None):
        raise RecipeError(f"{where}: {odd!r:.60} is no text in UTF-8. Correct it, or rename the file.")
    if is_mergekit(data):
        data = {"job": "merge", **data}
    elif "job" not in data and {"base_model", "experts"} <= data.keys():  # a file of mergekit-moe
        data = {"job": "moe", **data}
    name = data.get("job")
    if not isinstance(name, str):
        close = [key for key in data if isinstance(key, str) and did_you_mean(key, ["job"]).startswith("Did")]
        typed = f" There is a key {close[0]!r}." if close and close != ["job"] else ""
        raise RecipeError(f"{where}: 'job' is missing.{typed} Set job to one of: {', '.join(registry.job)}.")
    for place, variable in secrets_in(data):
        raise RecipeError(f"{where}: {place} holds a key or a password. Put it into {variable}, and take it out here.")
    schema = job_schema(name)
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        raise RecipeError(explain(error, where, schema)) from None
    except ModicumError:
        raise
    except RecursionError:
        raise RecipeError(f"{where} is nested too deeply. Write it flatter.") from None
    except MALFORMED as error:  # a value of a kind that nobody thought of
        told = f"{type(error).__name__}: {first_line(error)}"
        raise RecipeError(f"{where}: a value has the wrong kind ({told}) See: modicum show {name}") from None


def _texts(data: Any) -> Iterator[str]:
    """Yield every text in a recipe, keys among them."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            left += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            left += value


def job_schema(name: str) -> type[Recipe]:
    """Return the schema of the job called ``name``."""
    function = registry.job[name].function
    first = next(iter(registry.job[name].parameters[0]))
    schema: type[Recipe] = get_type_hints(function)[first]
    return schema


def dump(recipe: Recipe) -> Data:
    """Return a recipe as plain data that YAML can hold and :func:`parse` reads back; defaults are written out."""
    return recipe.model_dump(mode="json", exclude_none=True)


def inputs_of(recipe: Recipe) -> Inputs:
    """Hash what a recipe reads; see :func:`modicum.inputs.look`."""
    return look(dict.fromkeys(recipe.inputs()))
