"""One table for each kind of method. The plain function's signature *is* its schema.

A method registers itself with a decorator in its own file; nothing else is edited::

    @merge_method("ties", paper="arXiv:2306.01708", laws={"permutation"})
    def ties(base, experts, *, density: Fraction, scale: float = 1.0): ...

Positional parameters are data. Keyword-only parameters are knobs: they must be annotated, their ranges stand in
``Annotated``, and they are what a recipe may set. ``rng`` is never a knob: the caller supplies it, and so is what the
fact ``supplied`` lists. The fact ``gather`` names a dataclass of further knobs, those of collecting the method's
data. A class (an optimiser, a gradient rule) follows the convention of ``torch.optim``: everything after its first
parameter is a knob.
"""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from types import MappingProxyType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from modicum.errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic.fields import FieldInfo

F = TypeVar("F", bound=Callable[..., Any])

SUPPLIED = frozenset({"rng"})  # keyword-only parameters that the caller supplies and a recipe cannot set


@dataclass(frozen=True)
class Entry:
    """A registered method: its function, its knobs and the facts stated about it."""

    noun: str
    name: str
    function: Callable[..., Any]
    paper: str | None
    laws: frozenset[str] = frozenset()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, inspect.Parameter]]:
        """Parameters that are data, and those that are knobs."""
        items = list(inspect.signature(self.function).parameters.items())
        supplied = SUPPLIED | set(self.facts.get("supplied", ()))
        if inspect.isclass(self.function):
            return dict(items[:1]), {name: p for name, p in items[1:] if name not in supplied}
        data = {name: p for name, p in items if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}
        knobs = {name: p for name, p in items if p.kind is p.KEYWORD_ONLY and name not in supplied}
        if gather := self.facts.get("gather"):
            knobs |= inspect.signature(gather).parameters
        return data, knobs

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @cached_property
    def schema(self) -> type[BaseModel]:
        """A pydantic model of the knobs, which refuses unknown ones."""
        from pydantic import ConfigDict, create_model

        target = self.function.__init__ if inspect.isclass(self.function) else self.function
        hints = get_type_hints(target, include_extras=True)
        if gather := self.facts.get("gather"):
            hints |= get_type_hints(gather, include_extras=True)
        fields: dict[str, Any] = {}
        for name, parameter in self.parameters[1].items():
            if parameter.kind is parameter.VAR_KEYWORD or name not in hints:
                raise TypeError(f"{self.noun} {self.name!r}: knob {name!r} needs a name and an annotation")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (hints[name], default)
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=False)
        return create_model(self.name, __config__=config, **fields)

    def knobs(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return ``values`` checked, coerced and completed with the defaults.

        Raises:
            RecipeError: A knob is unknown, missing or out of range.
        """
        from pydantic import ValidationError

        try:
            model = self.schema.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError(explain(error, f"{self.noun} {self.name!r}", self.schema)) from None
        return {name: getattr(model, name) for name in self.schema.model_fields}


class Registry(Mapping[str, Entry]):
    """A table of methods of one kind, filled by importing ``package`` when it is first asked for.

    Calling the registry gives the decorator that registers a method.
    """

    def __init__(self, kind: str, noun: str, package: str) -> None:
        self.kind, self.noun, self.package = kind, noun, package
        self._entries: dict[str, Entry] = {}
        self._complete = False

    def __call__(
        self, name: str, *, paper: str | None = None, laws: Iterable[str] = (), **facts: Any
    ) -> Callable[[F], F]:
        """Register the decorated function or class as ``name``; ``facts`` are what the seam needs to know of it."""

        def register(function: F) -> F:
            known = self._entries.get(name)
            # Doctest and reload import a module twice; only a second *function* under one name is a mistake.
            if known and (known.function.__module__, known.function.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise TypeError(f"{self.noun} {name!r} is registered twice")
            self._entries[name] = Entry(self.noun, name, function, paper, frozenset(laws), MappingProxyType(facts))
            return function

        return register

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            # A method usually lives in the file of its name: importing that one alone keeps the start short.
            if name.isidentifier() and find_spec(self.package) and find_spec(f"{self.package}.{name}"):
                import_module(f"{self.package}.{name}")
            if name not in self._entries:
                self._load_all()
        if name not in self._entries:
            raise RecipeError(f"There is no {self.noun} {name!r}. {did_you_mean(name, self)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load_all()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load_all()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._load_all()
        return len(self._entries)

    def summaries(self) -> dict[str, str]:
        """Return the name and the first line of every method, read from the sources.

        Importing them would import torch and transformers, for which a list of names should not wait.
        """
        root, *rest = self.package.split(".")
        folder = files(root).joinpath(*rest) if find_spec(root) else None
        found: dict[str, str] = {}
        for file in folder.iterdir() if folder is not None and folder.is_dir() else ():
            if file.name.endswith(".py"):
                text = file.read_text(encoding="utf-8")
                found |= {name: line for table, name, line in _registrations(text) if globals().get(table) is self}
        return dict(sorted(found.items()))

    def _load_all(self) -> None:
        # A kind whose package is not part of this installation is an empty table, not an error.
        if not self._complete and find_spec(self.package):
            for module in pkgutil.iter_modules(import_module(self.package).__path__, f"{self.package}."):
                import_module(module.name)
        self._complete = True


merge_method = Registry("merge_methods", "merge method", "modicum.weights.methods")
averager = Registry("averagers", "averager", "modicum.weights")
gradient_rule = Registry("gradient_rules", "gradient rule", "modicum.optim.gradient")
objective = Registry("objectives", "objective", "modicum.objectives")
adapter_init = Registry("adapter_inits", "adapter initialisation", "modicum.adapters")
zeroth_order = Registry("zeroth_order", "zeroth-order optimiser", "modicum.optim.zeroth_order")
policy = Registry("policies", "policy", "modicum.submodular")
attack = Registry("attacks", "attack", "modicum.evaluate")
judge = Registry("judges", "judge", "modicum.evaluate")
model = Registry("models", "model", "modicum.models.zero_token")
job = Registry("jobs", "job", "modicum.jobs")

REGISTRIES: Mapping[str, Registry] = MappingProxyType(
    {
        r.kind: r
        for r in (
            merge_method,
            averager,
            gradient_rule,
            objective,
            adapter_init,
            zeroth_order,
            policy,
            attack,
            judge,
            model,
            job,
        )
    }
)


@cache
def _registrations(text: str) -> list[tuple[str, str, str]]:
    """Return table, name and first line of every function and class that a module registers with a decorator."""
    if __name__ not in text:
        return []
    body, found = ast.parse(text).body, []
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == __name__]
    tables = {alias.asname or alias.name: alias.name for node in imports for alias in node.names}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and isinstance(mark.func, ast.Name) and mark.func.id in tables:
                    found.append((tables[mark.func.id], ast.literal_eval(mark.args[0]), line))
    return found


def explain(error: ValidationError, where: str, schema: type[BaseModel]) -> str:
    """Turn pydantic's report into lines of the form *where: key: what is wrong, what came, what to do*."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        # In a union pydantic reports every branch under the branch's type, which the user never wrote.
        location = [
            part for part in item["loc"] if isinstance(part, int) or (part not in _BRANCHES and "[" not in part)
        ]
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
    return "\n".join(lines.values())


_BRANCHES = frozenset(
    {"float", "int", "str", "bool", "constrained-float", "constrained-int", "constrained-str", "none"}
)


def describe_type(field: FieldInfo) -> str:
    """Return a field's type and range as a person would write it.

    Example:
        >>> describe_type(merge_method["task_arithmetic"].schema.model_fields["scale"])
        'float'
        >>> describe_type(gradient_rule["adagc"].schema.model_fields["beta"])
        'float >= 0 < 1'
    """
    return _describe(field.annotation, field.metadata)


def _describe(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _describe(arguments[0], arguments[1:])
    if origin in (Union, UnionType):
        return " or ".join("nothing" if part is type(None) else _describe(part) for part in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    name = annotation.__name__ if inspect.isclass(annotation) and not arguments else str(annotation)
    if origin is not None and arguments:
        inner = ", ".join("…" if part is ... else _describe(part) for part in arguments)
        name = f"{getattr(origin, '__name__', origin)}[{inner}]"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [f"{sign} {getattr(m, key)}" for m in metadata for key, sign in signs.items() if hasattr(m, key)]
    return " ".join([name, *bounds])


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
