"""One table for each kind of method. The plain function's signature *is* its schema.

A method registers itself with a decorator in its own file; nothing else is edited::

    @merge_method("ties", paper="arXiv:2306.01708", laws={"permutation"})
    def ties(base, experts, *, density: Fraction, scale: float = 1.0): ...

Positional parameters are data. Keyword-only parameters are knobs: they must be annotated, their ranges stand in
``Annotated``, and they are what a recipe may set; a caller by hand is held to them too. ``rng``, or ``generator``, is
never a knob: the caller supplies it, and so is what the fact ``supplied`` lists. The fact ``gather`` names a dataclass
of further knobs, those of collecting the method's data; the further functions of a measure have knobs too. A class (an
optimiser, a gradient rule) follows the convention of ``torch.optim``: everything after its first parameter is a knob.
Knobs that several methods share are unpacked from a ``TypedDict``, see :mod:`modicum.knobs`. The decorator's keywords
are facts: the fields of the table's dataclass in :mod:`modicum.facts`.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.resources import files
from importlib.resources.abc import Traversable
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from modicum.errors import RecipeError, did_you_mean
from modicum.facts import (
    AdapterFacts,
    AttackFacts,
    AveragerFacts,
    Facts,
    GradientFacts,
    JudgeFacts,
    MeasureFacts,
    MergeFacts,
    ObjectiveFacts,
    PartFacts,
    PolicyFacts,
    ZerothOrderFacts,
)
from modicum.job_facts import JobFacts, RowKindFacts, SourceFacts
from modicum.knobs import guarded, parameters
from modicum.model_facts import ModelFacts, StoreFacts
from modicum.schema import explain, numbers_in

if TYPE_CHECKING:
    from pydantic import BaseModel

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
T = TypeVar("T", bound=Facts, covariant=True)

SUPPLIED = frozenset({"rng", "generator"})  # what random numbers come from: the caller supplies it, no recipe sets it


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered method: its function, its knobs and the facts stated about it."""

    noun: str
    name: str
    function: Callable[..., Any]
    facts: T

    @property
    def paper(self) -> str | None:
        """Where the method was published."""
        return self.facts.paper

    @property
    def laws(self) -> frozenset[str]:
        """Laws that the method obeys."""
        return frozenset(self.facts.laws)

    @cached_property
    def parameters(self) -> tuple[Mapping[str, inspect.Parameter], Mapping[str, inspect.Parameter]]:
        """Parameters that are data, and those that are knobs."""
        items = list(parameters(self.function).items())
        supplied = SUPPLIED | set(self.facts.supplied)
        if inspect.isclass(self.function):
            return dict(items[:1]), {name: p for name, p in items[1:] if name not in supplied}
        data = {name: p for name, p in items if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)}
        knobs = {name: p for name, p in items if p.kind is p.KEYWORD_ONLY and name not in supplied}
        for source in self.facts.further:
            # A dataclass is all knobs, even one that the seam hands on; a function has data too.
            for name, p in parameters(source).items():
                if inspect.isclass(source) or (name not in supplied and p.kind is p.KEYWORD_ONLY):
                    knobs[name] = p
        return data, knobs

    @cached_property
    def asks(self) -> frozenset[str]:
        """Keyword-only parameters, what the caller supplies among them."""
        items = inspect.signature(self.function).parameters.values()
        return frozenset(p.name for p in items if p.kind is p.KEYWORD_ONLY)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @cached_property
    def schema(self) -> type[BaseModel]:
        """A pydantic model of the knobs, which refuses unknown ones."""
        from pydantic import ConfigDict, create_model

        fields: dict[str, Any] = {}
        for name, parameter in self.parameters[1].items():
            if parameter.kind is parameter.VAR_KEYWORD or parameter.annotation is parameter.empty:
                raise TypeError(f"{self.noun} {self.name!r}: knob {name!r} needs a name and an annotation")
            default = ... if parameter.default is parameter.empty else parameter.default
            fields[name] = (numbers_in(parameter.annotation), default)
        config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=False, allow_inf_nan=False)
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


class Registry(Mapping[str, Entry[T]], Generic[P, T]):
    """A table of methods of one kind: whatever the files of ``package`` and its subpackages register in it.

    Calling the registry gives the decorator that registers a method. Names are found by reading the sources; a method's
    file is imported when the method is first asked for.
    """

    def __init__(self, kind: str, noun: str, package: str, facts: Callable[P, T] = Facts) -> None:  # type: ignore[assignment]
        self.kind, self.noun, self.package, self.facts = kind, noun, package, facts
        self._entries: dict[str, Entry[T]] = {}

    def __call__(self, name: str, *args: P.args, **facts: P.kwargs) -> Callable[[F], F]:
        """Register the decorated function or class as ``name``, with the facts of its table."""
        stated = self.facts(*args, **facts)

        def register(function: F) -> F:
            known = self._entries.get(name)
            # Doctest and reload import a module twice; only a second *function* under one name is a mistake.
            if known and (known.function.__module__, known.function.__qualname__) != (
                function.__module__,
                function.__qualname__,
            ):
                raise TypeError(f"{self.noun} {name!r} is registered twice")
            checked = guarded(function)
            self._entries[name] = Entry(self.noun, name, checked, stated)
            return checked

        return register

    def __getitem__(self, name: str) -> Entry[T]:
        if name not in self._entries:
            # A method usually lives in the file of its name: importing that one alone saves reading all the others.
            if name.isidentifier() and find_spec(self.package) and find_spec(f"{self.package}.{name}"):
                import_module(f"{self.package}.{name}")
            if name not in self._entries and name in self._sources:
                import_module(self._sources[name][0])
        if name not in self._entries:
            raise RecipeError(f"There is no {self.noun} {name!r}. {did_you_mean(name, self)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries or name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._entries, *self._sources}))

    def __len__(self) -> int:
        return len({*self._entries, *self._sources})

    def summaries(self) -> dict[str, str]:
        """Return the name and the first line of every method, read from the sources.

        Importing them would import torch and transformers, for which a list of names should not wait.
        """
        return {name: self._sources[name][1] for name in sorted(self._sources)}

    @cached_property
    def _sources(self) -> Mapping[str, tuple[str, str]]:
        """Module and first line of every method in the package's files; empty where the package is not installed."""
        root, *rest = self.package.split(".")
        folder = files(root).joinpath(*rest) if find_spec(root) else None
        if folder is None or not folder.is_dir():
            return {}
        return {
            name: (module, line)
            for module, file in _modules(folder, self.package)
            for source, table, name, line in _registrations(file.read_text(encoding="utf-8"))
            if getattr(sys.modules.get(source), table, None) is self
        }


merge_method = Registry("merge_methods", "merge method", "modicum.weights.methods", MergeFacts)
expert_store = Registry("expert_stores", "expert store", "modicum.weights.stores", StoreFacts)
averager = Registry("averagers", "averager", "modicum.weights.averagers", AveragerFacts)
gradient_rule = Registry("gradient_rules", "gradient rule", "modicum.optim.gradient", GradientFacts)
objective = Registry("objectives", "objective", "modicum.objectives", ObjectiveFacts)
adapter_init = Registry("adapter_inits", "adapter initialisation", "modicum.adapters", AdapterFacts)
zeroth_order = Registry("zeroth_order", "zeroth-order optimiser", "modicum.optim.zeroth_order", ZerothOrderFacts)
policy = Registry("policies", "policy", "modicum.submodular", PolicyFacts)
attack = Registry("attacks", "attack", "modicum.evaluate.attacks", AttackFacts)
judge = Registry("judges", "judge", "modicum.evaluate.judges", JudgeFacts)
measure = Registry("measures", "measure", "modicum.evaluate.measures", MeasureFacts)
model = Registry("models", "model", "modicum.models", ModelFacts)
source = Registry("sources", "data source", "modicum.jobs.data.sources", SourceFacts)
row_kind = Registry("row_kinds", "kind of rows", "modicum.jobs.data.kinds", RowKindFacts)
job = Registry("jobs", "job", "modicum.jobs", JobFacts)
# No methods, but mechanisms of jobs, so they are not listed among the tables below.
executor: Registry[..., Facts] = Registry("executors", "executor", "modicum.jobs.executors")
training_part = Registry("training_parts", "training part", "modicum.jobs.training.parts", PartFacts)

REGISTRIES: Mapping[str, Registry[..., Facts]] = MappingProxyType(
    {
        table.kind: table
        for table in (
            # In the order of the work: data, training, averages, merges, evaluation, agents. What comes last stays in
            # view where a terminal lists all: the jobs, and after them the recipes.
            source,
            row_kind,
            model,
            objective,
            gradient_rule,
            zeroth_order,
            adapter_init,
            averager,
            merge_method,
            expert_store,
            measure,
            attack,
            judge,
            policy,
            job,
        )
    }
)


def wanted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``offered`` that ``function`` has keyword-only parameters for.

    Example:
        >>> def share(items, *, level): ...
        >>> wanted(share, {"level": 0.95, "seed": 0})
        {'level': 0.95}
    """
    parameters = inspect.signature(function).parameters.values()
    return {p.name: offered[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in offered}


def _modules(folder: Traversable, package: str) -> Iterator[tuple[str, Traversable]]:
    """Yield name and file of every module under ``folder``."""
    for item in sorted(folder.iterdir(), key=lambda item: item.name):
        if item.is_dir():
            yield from _modules(item, f"{package}.{item.name}")
        elif item.name.endswith(".py"):
            stem = item.name.removesuffix(".py")
            yield (package if stem == "__init__" else f"{package}.{stem}"), item


@cache
def _registrations(text: str) -> list[tuple[str, str, str, str]]:
    """Return what a module registers by decorators: the table's module and name, the method's name and first line."""
    if "registry import" not in text:
        return []
    body, found = ast.parse(text).body, []
    imports = [node for node in body if isinstance(node, ast.ImportFrom) and node.module]
    tables = {a.asname or a.name: (str(node.module), a.name) for node in imports for a in node.names}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            line = (ast.get_docstring(node) or "").partition("\n")[0]
            for mark in node.decorator_list:
                match mark:
                    case ast.Call(func=ast.Name(id=table), args=[ast.Constant(value=str(name)), *_]) if table in tables:
                        found.append((*tables[table], name, line))
    return found
