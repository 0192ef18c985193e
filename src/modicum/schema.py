"""What a schema says to people: errors as one line each, types as a person would write them."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, ForwardRef, Literal, Union, get_args, get_origin

from modicum.errors import did_you_mean
from modicum.types import Unbounded, bounds_of, range_in_words

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo


def explain(error: ValidationError, where: str, schema: type[BaseModel]) -> str:
    """Turn pydantic's report into lines of the form *where: key: what is wrong, what came, what to do*."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        # In a union pydantic reports every branch under the branch's type, which the user never wrote.
        location = [
            part for part in item["loc"] if isinstance(part, int) or (part not in _BRANCHES and "[" not in part)
        ]
        if item["type"] == "extra_forbidden" and location[-1:] != [item["loc"][-1]]:
            location.append(item["loc"][-1])  # a key of the user's own, whatever it is called
        path = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            parent = _model_at(schema, location[:-1])
            hint = did_you_mean(str(location[-1]), parent.model_fields) if parent else "Remove it."
            line = f"{where}: unknown key {path!r}. {hint}"
        elif item["type"] == "missing":
            line = f"{where}: {path!r} is missing. Set it."
        else:
            message = item["msg"].removeprefix("Value error, ")
            if item["type"] != "value_error":
                message = f"{message}, got {_short(item['input'])}"
            ended = message if message.endswith((".", "?")) else f"{message}."
            # A method's own knobs were explained before: each of their lines says where it belongs.
            line = "\n".join(": ".join(filter(None, (where, path, part))) for part in ended.splitlines())
        lines.setdefault(path, line)
    # Of a list where a number may stand too, the entries tell more than that the list is none.
    inner = {path for path in lines if any(other.startswith(f"{path}.") for other in lines)}
    return "\n".join(line for path, line in lines.items() if path not in inner)


def numbers_in(annotation: Any) -> Any:
    """Return the type of a knob as pydantic reads it: a number is finite, unless its infinity stands for no limit."""
    if not any(isinstance(mark, Unbounded) for mark in getattr(annotation, "__metadata__", ())):
        return annotation
    from pydantic import AfterValidator, Field

    def is_number(value: float) -> float:
        if math.isnan(value):
            raise ValueError("Input should be a number, got nan")
        return value

    return Annotated[annotation, Field(allow_inf_nan=True), AfterValidator(is_number)]


def not_finite(value: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yield place and value of every number that is not finite, in data whose schema belongs to somebody else.

    Example:
        >>> list(not_finite({"lr": 0.1, "betas": [0.9, float("nan")]}))
        [('betas.1', nan)]
    """
    if isinstance(value, float) and not math.isfinite(value):
        yield where, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from not_finite(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            yield from not_finite(item, f"{where}.{position}".lstrip("."))


_BRANCHES = frozenset(
    {"float", "int", "str", "bool", "constrained-float", "constrained-int", "constrained-str", "none"}
)


@dataclass(frozen=True)
class Noun:
    """Marks a type with the word that a person would use for its values."""

    word: str


def classes_in(annotation: Any) -> Iterator[type]:
    """Yield the classes that an annotation is made of."""
    if inspect.isclass(annotation) and not get_args(annotation):
        yield annotation
    for part in get_args(annotation):
        yield from classes_in(part)


# Keys that mean the same in every recipe, where they say nothing of their own.
EVERYWHERE = {
    "job": "what to do",
    "seed": "names every random draw: the same seed gives the same run",
    "allow_pickle": "allow pytorch_model.bin, read with weights_only=True",
    "remote_code": "fetch the code that comes with a model",
    "shard_bytes": "largest weight file",
}


def fields(schema: type[BaseModel]) -> Iterator[tuple[str, str, str, str]]:
    """Yield name, type, default and meaning of every field, as a person would write them in YAML."""
    for name, field in schema.model_fields.items():
        default = field.get_default(call_default_factory=True)
        if field.is_required():
            said = "required"
        elif getattr(type(default), "noun", None):
            said = "its defaults"
        else:
            said = in_yaml(default)
        yield name, describe_type(field), said, field.description or EVERYWHERE.get(name, "")


def in_yaml(value: Any) -> str:
    """Return a value as a person would write it in a recipe.

    Example:
        >>> in_yaml([None, True, 0.5, "tensor", "true", {"a": float("inf")}])
        '[null, true, 0.5, tensor, "true", {a: .inf}]'
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value).replace("inf", ".inf").replace("nan", ".nan")
    if chosen := getattr(value, "model_fields_set", None):  # a section, or a method with its knobs
        value = {name: getattr(value, name) for name in type(value).model_fields if name in chosen}
    if isinstance(value, Mapping) and [*value] == ["name"]:  # a method without knobs is written as its name
        return in_yaml(value["name"])
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{in_yaml(key)}: {in_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(in_yaml, value)) + "]"
    if isinstance(value, str) and (value.lower() in _NO_TEXT or not re.fullmatch(r"[A-Za-z_][\w./:+-]*(?<!:)", value)):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


_NO_TEXT = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})  # what YAML takes such words for


def describe_type(field: FieldInfo) -> str:
    """Return a field's type and range as a person would write it.

    Example:
        >>> from modicum.registry import gradient_rule, merge_method
        >>> describe_type(merge_method["task_arithmetic"].schema.model_fields["scale"])
        'float'
        >>> describe_type(gradient_rule["adagc"].schema.model_fields["beta"])
        'float in [0, 1)'
    """
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], arguments[1:])
    if word := next((mark.word for mark in metadata if isinstance(mark, Noun)), getattr(annotation, "noun", None)):
        return str(word)
    if isinstance(annotation, ForwardRef):  # of a section that holds itself
        return re.sub(r"\w+Section", "section", annotation.__forward_arg__)
    if origin in (Union, UnionType):
        return " or ".join("nothing" if part is type(None) else _describe(part) for part in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    name = annotation.__name__ if inspect.isclass(annotation) and not arguments else str(annotation)
    if origin is not None and arguments:
        inner = ", ".join("…" if part is ... else _describe(part) for part in arguments)
        name = f"{getattr(origin, '__name__', origin)}[{inner}]"
    return f"{name} {range_in_words(dict(bounds_of(metadata)))}".rstrip()


def _model_at(schema: type[BaseModel], path: Iterable[str | int]) -> type[BaseModel] | None:
    """Follow ``path`` through nested models; ``None`` where it leads through something else, such as a union."""
    from pydantic import BaseModel

    current: type[BaseModel] | None = schema
    for part in path:
        if isinstance(part, int):
            continue
        if current is None or part not in current.model_fields:
            return None
        annotation = current.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        current = next((c for c in candidates if inspect.isclass(c) and issubclass(c, BaseModel)), None)
    return current


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
