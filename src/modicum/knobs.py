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
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, wraps
from numbers import Real
from operator import ge, gt, le, lt
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

from modicum.errors import RecipeError, did_you_mean
from modicum.types import Unbounded, bounds_of, range_in_words

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


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


def guarded(function: F) -> F:
    """Make a function or class refuse numbers outside their annotated ranges, and choices that there are none of.

    A recipe's knobs are checked by their schema; this is for those who call by hand. Lists of data stay unread: items
    are looked at in keyword-only parameters alone, or in those of a class.

    Example:
        >>> from modicum.types import UnitInterval
        >>> @guarded
        ... def mask(ids: list[int], *, ratio: UnitInterval) -> None: ...
        >>> mask([1, 2], ratio=1.5)
        Traceback (most recent call last):
        modicum.errors.RecipeError: ratio is 1.5, expected a number in [0, 1].
    """
    target: Any = function
    inner = target.__init__ if inspect.isclass(target) else target
    skip = int(inspect.isclass(target))  # self
    found: list[Any] = []  # at the first call: what annotations name may not be there before

    @wraps(inner)
    def guard(*args: Any, **knobs: Any) -> Any:
        if not found:
            found.extend(_tests(target))
        positional, tests = found
        for (name, test), value in zip(positional, args[skip:], strict=False):
            if test is not None and not test(value):
                raise RecipeError(_refusal(target, name, value))
        for name, value in knobs.items():
            test = tests.get(name)
            if test is not None and not test(value):
                raise RecipeError(_refusal(target, name, value))
        return inner(*args, **knobs)

    if skip:
        target.__init__ = guard
        return function
    return guard  # type: ignore[return-value]


def _tests(function: Callable[..., Any]) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """Return names and tests of the positional parameters, in order, and the tests of all that have one by name."""
    tests = {}
    for name, p in readable(function).items():
        data = p.kind is not p.KEYWORD_ONLY and not inspect.isclass(function)
        if test := _test(p.annotation, items=not data):
            tests[name] = test
    kinds = inspect.signature(function).parameters.values()
    positional = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return [(name, tests.get(name)) for name in positional], tests


def readable(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters, those whose annotations name what only a type checker imports without annotation."""
    try:
        return parameters(function)
    except (NameError, TypeError):
        inner: Any = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
        found = {}
        for name, p in inspect.signature(function).parameters.items():
            told = SimpleNamespace(__annotations__={name: p.annotation})
            try:
                hint = get_type_hints(told, inner.__globals__, include_extras=True)[name]
            except (NameError, TypeError):
                hint = Any
            found[name] = p.replace(annotation=hint)
        return found


def _test(annotation: Any, *, items: bool) -> Callable[[Any], bool] | None:
    """Return what tells whether a value is one of a type, or ``None`` for a type with neither numbers nor choices."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float) or (origin is Annotated and arguments[0] in (int, float)):
        return _number_test(annotation)
    if origin is Annotated:
        return _test(arguments[0], items=items)
    if origin is Literal:
        return lambda value: any(isinstance(value, type(choice)) and value == choice for choice in arguments)
    if origin in (Union, UnionType):
        tests = [_test(part, items=items) for part in arguments]
        if not any(tests):
            return None
        parts = [test or _other_test(part) for test, part in zip(tests, arguments, strict=True)]
        return lambda value: any(part(value) for part in parts)
    if not items or not isinstance(origin, type) or not issubclass(origin, Sequence) or int in arguments:
        return None
    inner = [_test(part, items=items) for part in arguments if part is not ...]
    if not any(inner):
        return None
    fixed = origin is tuple and ... not in arguments

    def fit(value: Any) -> bool:
        if not isinstance(value, list | tuple):
            return not isinstance(value, Real | str | NoneType)
        tests = inner if fixed else inner * len(value)
        return len(tests) == len(value) and all(test is None or test(item) for test, item in zip(tests, value))

    return fit


def _number_test(annotation: Any) -> Callable[[Any], bool]:
    kind, bounds, unbounded = _number(annotation)
    if not unbounded:  # NaN is neither above nor below anything
        bounds = [("gt", -math.inf), ("lt", math.inf), *bounds]
    holds = [(_HOLDS[sign], limit) for sign, limit in bounds]

    def fits(value: Any) -> bool:
        # Asking an abstract class takes far longer than comparing types.
        if type(value) is not int and type(value) is not float and not isinstance(value, Real):
            # What computes as a number, such as a tensor of one entry, is not asked: that could wait for a device.
            return not isinstance(value, str | list | tuple | dict | NoneType)
        if kind is int and type(value) is not int and value % 1:  # 2.0 may stand for 2, as in a recipe
            return False
        for hold, limit in holds:  # noqa: SIM110 - a generator would cost as much as the comparisons
            if not hold(value, limit):
                return False
        return True

    return fits


def _other_test(kind: Any) -> Callable[[Any], bool]:
    if kind in (str, bool, NoneType):
        return lambda value: isinstance(value, kind)
    return lambda value: kind is Any or not isinstance(value, Real | str | NoneType)


_HOLDS: Mapping[str, Callable[[Any, Any], bool]] = {"gt": gt, "ge": ge, "lt": lt, "le": le}


def _number(annotation: Any) -> tuple[type, list[tuple[str, Any]], bool]:
    """Return a number's kind, its bounds, and whether it may be infinite."""
    kind, *marks = get_args(annotation) or (annotation,)
    return kind, bounds_of(marks), any(isinstance(mark, Unbounded) for mark in marks)


def _refusal(function: Callable[..., Any], name: str, value: object) -> str:
    """Say what came for a parameter and what was expected."""
    told = list(_expected(readable(function)[name].annotation))
    choices = [choice for choice, quoted in told if quoted]
    if isinstance(value, str) and len(choices) == len([1 for word, _ in told if word != "None"]):
        return f"{name} is {value!r}. {did_you_mean(value, choices)}"
    words = [repr(word) if quoted else word for word, quoted in told]
    return f"{name} is {value!r}, expected {' or '.join(words)}."


def _expected(annotation: Any) -> Iterator[tuple[str, bool]]:
    """Yield the words for what a type takes, and whether each is a choice to be written as it stands."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float) or (origin is Annotated and arguments[0] in (int, float)):
        kind, bounds, unbounded = _number(annotation)
        noun = "a whole number" if kind is int else "a number" if bounds or unbounded else "a finite number"
        yield f"{noun} {range_in_words(dict(bounds))}".rstrip(), False
    elif origin is Annotated:
        yield from _expected(arguments[0])
    elif origin is Literal:
        yield from ((choice, True) if isinstance(choice, str) else (repr(choice), False) for choice in arguments)
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from _expected(part)
    elif isinstance(origin, type) and issubclass(origin, Sequence):
        inner = [" or ".join(word for word, _ in _expected(part)) for part in arguments if part is not ...]
        counted = origin is tuple and ... not in arguments
        yield f"({', '.join(inner)})" if counted else f"a list, each item {inner[0]}", False
    else:
        yield "None" if annotation is NoneType else getattr(annotation, "__name__", str(annotation)), False


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


def explanations(function: Callable[..., Any]) -> dict[str, str]:
    """Return what the docstring of a function or class says of each of its arguments, in one line each."""
    return {name: " ".join(said.split()) for name, said in _arguments(documentation(function)).items()}


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
