"""Knobs that several methods share, declared once and unpacked in their signatures.

A ``TypedDict`` names the knobs with their types and ranges. The class that they become fields of holds their defaults
and explains them::

    @fields_of(Settings)
    class Shared(TypedDict, total=False):
        seed: int

    def mezo(params, *, lr: float, **shared: Unpack[Shared]):
        settings = Settings(lr=lr, **known(mezo, shared))

mypy checks the callers, and that the class takes every knob; the registry reads :func:`parameters`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar, Unpack, get_args, get_origin, get_type_hints

from modicum.errors import RecipeError, did_you_mean

T = TypeVar("T")


def fields_of(owner: type) -> Callable[[type[T]], type[T]]:
    """Say of which class the keys of a ``TypedDict`` are fields: it holds their defaults and explains them."""

    def mark(keys: type[T]) -> type[T]:
        # A TypedDict takes no other attribute in its body, and passes none on to those that extend it.
        keys.__fields_of__ = owner  # type: ignore[attr-defined]
        return keys

    return mark


def unpacked(function: Callable[..., Any]) -> Any:
    """Return the ``TypedDict`` whose keys a function takes as keywords, or ``None``."""
    return next((get_args(hint)[0] for hint in _hints(function).values() if get_origin(hint) is Unpack), None)


@cache
def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function or class, their annotations resolved, unpacked keywords one by one.

    Raises:
        TypeError: The unpacked keys do not say whose fields they are, or it lacks one of them.
    """
    hints, keys = _hints(function), unpacked(function)
    found = {
        name: p.replace(annotation=hints.get(name, p.empty))
        for name, p in inspect.signature(function).parameters.items()
        if keys is None or p.kind is not p.VAR_KEYWORD
    }
    if keys is None:
        return found
    owner = getattr(keys, "__fields_of__", None)
    if owner is None:
        raise TypeError(f"{keys.__name__} is unpacked without defaults: mark it with @fields_of(…).")
    fields = inspect.signature(owner).parameters
    for name, hint in get_type_hints(keys, include_extras=True).items():
        if name not in fields:
            raise TypeError(f"{owner.__name__} has no field {name}, which {keys.__name__} names.")
        found[name] = fields[name].replace(annotation=hint, kind=inspect.Parameter.KEYWORD_ONLY)
    return found


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    target: Any = function.__init__ if inspect.isclass(function) else function
    return get_type_hints(target, include_extras=True)


def known(function: Callable[..., Any], given: T) -> T:
    """Return the keywords that a function was given, unless one of them is not its own.

    Raises:
        TypeError: One is not, as for any other function, with the closest that is.
    """
    names: Any = given
    if names:
        knobs = parameters(function)
        for name in names:
            if name not in knobs:
                hint = did_you_mean(name, knobs)
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}. {hint}")
    return given


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse a value that is none of a ``Literal``'s.

    Example:
        >>> from typing import Literal
        >>> check_choice("scale", "unit", Literal["unit", "none"])

    Raises:
        RecipeError: It is none of them.
    """
    check_among(name, value, get_args(choices))


def check_among(name: str, value: object, known: Sequence[object]) -> None:
    """Refuse a value that is none of those known.

    Raises:
        RecipeError: It is none of them.
    """
    if value not in known:
        told = (str(choice) for choice in known if choice is not None)
        raise RecipeError(f"{name} is {value!r}. {did_you_mean(str(value), told)}")


def documentation(function: Callable[..., Any]) -> str:
    """Return a docstring with each unpacked keyword explained as where it is a field.

    The explanations take the place of the argument that stands for all of them, ``**knobs``.
    """
    text, keys = inspect.getdoc(function) or "", unpacked(function)
    if keys is None:
        return text
    said = _arguments(inspect.getdoc(keys.__fields_of__) or "")
    lines = "\n".join(f"    {name}:{said[name]}" for name in get_type_hints(keys) if name in said)
    return re.sub(r"^    \*\*\w+:.*(?:\n {8}.*)*", lambda _: lines, text, count=1, flags=re.MULTILINE)


def plain(text: str) -> str:
    """Return a docstring without the marks that only Sphinx reads.

    Example:
        >>> plain("Draw :math:`V` anew every ``refresh_every`` steps.")
        'Draw V anew every `refresh_every` steps.'
    """
    text = re.sub(r"^ *\.\. math::\n\n?", "", text, flags=re.MULTILINE)
    text = re.sub(r":\w+:`~?([^`]*)`", r"\1", text)
    return re.sub(r" *# doctest: \+\w+", "", text.replace("``", "`"))


def _arguments(docstring: str) -> dict[str, str]:
    """Return what a docstring in Google's style says of each argument or attribute, as it stands there."""
    section = re.search(r"^(?:Args|Attributes):\n((?:    .*\n|\n)+)", docstring + "\n", re.MULTILINE)
    items = re.split(r"^    (?=\w+:)", section.group(1), flags=re.MULTILINE)[1:] if section else []
    return {name: said.rstrip() for name, _, said in (item.partition(":") for item in items)}
