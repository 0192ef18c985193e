"""No knob of any method, and no number of any recipe, may be NaN or infinite, however deep it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import pytest
import torch
from pydantic import BaseModel

from modicum import registry
from modicum.errors import CheckpointError, RecipeError
from modicum.knobs import readable
from modicum.recipe import job_schema, override, parse
from modicum.registry import REGISTRIES, Entry
from modicum.schema import not_finite
from modicum.types import Unbounded

OFFERING = ("adapters", "evaluate", "models", "objectives", "optim", "safety", "submodular", "weights")
BAD: tuple[Any, ...] = (math.nan, math.inf, -math.inf, "nan", "inf", "-Infinity")
ENTRIES = [
    pytest.param(entry, id=f"{entry.noun}-{entry.name}") for table in REGISTRIES.values() for entry in table.values()
]


def placed(annotation: Any, bad: Any) -> Iterator[Any]:
    """Yield values of a type with ``bad`` in the place of each float."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is float:
        yield bad
    elif origin is Annotated:
        yield from placed(arguments[0], bad)
    elif origin in (Union, UnionType):
        for part in arguments:
            yield from placed(part, bad)
    elif origin is tuple and ... not in arguments:
        for i, part in enumerate(arguments):
            rest = [next(placed(other, 0.5), None) for other in arguments]
            yield from ((*rest[:i], value, *rest[i + 1 :]) for value in placed(part, bad))
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        yield from ({"a": value} for value in placed(arguments[-1], bad))
    elif origin is not None and arguments and origin is not type:
        yield from ([value] for value in placed(arguments[0], bad))


def unbounded(entry: Entry, name: str) -> bool:
    annotation = entry.parameters[1][name].annotation
    return any(isinstance(mark, Unbounded) for mark in getattr(annotation, "__metadata__", ()))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_knob_that_is_not_finite_is_named(entry: Entry) -> None:
    for name, parameter in entry.parameters[1].items():
        for bad in BAD:
            if unbounded(entry, name) and bad in (math.inf, "inf"):
                continue
            for value in placed(parameter.annotation, bad):
                with pytest.raises(RecipeError, match=name):
                    entry.knobs({name: value})


def test_many_knobs_are_numbers_and_few_may_be_infinite() -> None:
    knobs = [
        (entry.name, name)
        for table in REGISTRIES.values()
        for entry in table.values()
        for name, parameter in entry.parameters[1].items()
        if any(placed(parameter.annotation, 0.5))
    ]
    assert len(knobs) > 150
    free = {(e.name, n) for t in REGISTRIES.values() for e in t.values() for n in e.parameters[1] if unbounded(e, n)}
    assert free == {("adagc", "relative"), ("zclip", "limit")}
    assert registry.gradient_rule["adagc"].knobs({"relative": math.inf})["relative"] == math.inf


def test_defaults_are_finite() -> None:
    for table in REGISTRIES.values():
        for entry in table.values():
            for name, parameter in entry.parameters[1].items():
                default = parameter.default
                assert default is parameter.empty or not list(not_finite(default)), (entry.name, name)


@pytest.mark.parametrize("table", ["gradient_rules", "zeroth_order"])
@pytest.mark.parametrize("bad", BAD[:3])
def test_an_optimiser_of_a_loop_of_ones_own_refuses_them_too(table: str, bad: float) -> None:
    for entry in REGISTRIES[table].values():
        if not isinstance(entry.function, type):
            continue
        needed = {n: 0.1 for n, p in entry.parameters[1].items() if p.default is p.empty}
        for name, parameter in entry.parameters[1].items():
            if parameter.annotation is float and not (unbounded(entry, name) and bad == math.inf):
                with pytest.raises(RecipeError, match=name):
                    entry.function([torch.nn.Parameter(torch.ones(2, 2))], **(needed | {name: bad}))


def fields_of(
    schema: type[BaseModel], where: str = "", above: tuple[type[BaseModel], ...] = ()
) -> Iterator[tuple[str, Any]]:
    """Yield every field with its path; sections by name are reached through one that is called t."""
    for name, field in schema.model_fields.items():
        path = f"{where}{name}"
        named = get_origin(field.annotation) is dict
        inner = [a for a in (field.annotation, *get_args(field.annotation)) if isinstance(a, type)]
        for model in inner:
            if issubclass(model, BaseModel) and model not in above:
                yield from fields_of(model, f"{path}.t." if named else f"{path}.", (*above, schema))
        yield path, field.annotation


RECIPES: dict[str, dict[str, Any]] = {
    "merge": {"experts": ["a"], "method": "linear"},
    "average": {"checkpoints": ["a"]},
    "evaluate": {"model": "m", "tasks": {"t": {"kind": "exact_match", "data": {"path": "d"}}}},
    "statistics": {"model": "m", "kind": "gram", "data": {"path": "d"}},
    "calibrate": {"model": "m", "data": {"path": "d"}},
    "train": {"model": "m", "data": {"path": "d"}},
}


@pytest.mark.parametrize("job", RECIPES)
@pytest.mark.parametrize("bad", BAD)
def test_a_number_of_a_recipe_is_finite(job: str, bad: Any) -> None:
    for path, annotation in fields_of(job_schema(job)):
        for value in placed(annotation, bad):
            data = override({"job": job, **RECIPES[job]}, [])
            *parents, last = path.split(".")
            target = data
            for part in parents:
                found = target.get(part)
                target[part] = found if isinstance(found, dict) else {"path": found} if found else {}
                target = target[part]
            target[last] = value
            with pytest.raises(RecipeError, match=last):
                parse(data)


@pytest.mark.parametrize("bad", BAD[:3])
@pytest.mark.parametrize(
    ("job", "path"),
    [
        ("train", "trainer.learning_rate"),
        ("train", "trainer.lr_scheduler_kwargs.min_lr"),
        ("train", "adapter.config.lora_alpha"),
        ("train", "adapter.config.alpha_pattern.q_proj"),
        ("train", "model.scratch.rope_theta"),
        ("train", "data.config.x"),
        ("train", "objective.alpha"),
        ("merge", "method.weights"),
        ("evaluate", "tasks.t.data.config.x"),
    ],
)
def test_settings_that_another_library_checks_are_finite_too(job: str, path: str, bad: float) -> None:
    data = {"job": job, **RECIPES[job]}
    if path.startswith("objective"):
        data["objective"] = {"name": "neftune"}
    if path.startswith("model"):
        data["model"] = {"path": "m"}
    if path == "method.weights":
        data["method"] = {"name": "linear"}
    with pytest.raises(RecipeError, match=path.rpartition(".")[2]):
        parse(override(data, [f"{path}={'.nan' if bad != bad else '.inf' if bad > 0 else '-.inf'}"]))


def test_a_mergekit_file_is_finite() -> None:
    document = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": math.nan}}]}
    with pytest.raises(RecipeError, match="weight is nan"):
        parse(document)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e999", '"x"', "[]"])
@pytest.mark.parametrize("pattern", [False, True])
def test_an_adapter_whose_scale_is_no_number_is_refused(tmp_path: Any, alpha: str, pattern: bool) -> None:
    from safetensors.torch import save_file

    from modicum.weights.adapter import Adapter

    scale = f'"lora_alpha": 8, "alpha_pattern": {{"proj": {alpha}}}' if pattern else f'"lora_alpha": {alpha}'
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": 1, {scale}}}')
    prefix = "base_model.model.proj.lora_"
    save_file({f"{prefix}{s}.weight": torch.ones(1, 1) for s in "AB"}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="lora_alpha"):
        Adapter(tmp_path, owner="mine")


def public() -> Iterator[Any]:
    """Yield an id and the callable for all that a package offers by name, and every method of every table."""
    seen = set()
    for package in OFFERING:
        face = import_module(f"modicum.{package}")
        for name in face.__all__:
            if callable(found := getattr(face, name)) and id(found) not in seen:
                seen.add(id(found))
                yield pytest.param(found, id=f"{package}.{name}")
    for table in REGISTRIES.values():
        for name, entry in table.items():
            if id(entry.function) not in seen:
                seen.add(id(entry.function))
                yield pytest.param(entry.function, id=f"{table.kind}-{name}")


def outside(annotation: Any) -> Iterator[Any]:
    """Yield numbers just outside the range that an annotation states, or of no kind that it takes."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated and arguments[0] in (int, float):
        step = 1 if arguments[0] is int else 0.25
        for mark in arguments[1:]:
            for sign, away in (("gt", 0), ("ge", -step), ("lt", 0), ("le", step)):
                if hasattr(mark, sign):
                    yield getattr(mark, sign) + away
        yield math.nan
        if arguments[0] is int:
            yield 1.5
        elif not any(isinstance(mark, Unbounded) for mark in arguments[1:]):
            yield from (math.inf, -math.inf)
    elif origin is Annotated:
        yield from outside(arguments[0])
    elif origin in (Union, UnionType) and not {int, float, str} & {*arguments}:
        # A number is outside where it is outside of every part; the parts here are lists, names or nothing.
        yield from (value for part in arguments for value in outside(part))
    elif isinstance(origin, type) and issubclass(origin, Sequence) and arguments[0] not in (int, float):
        size = len(arguments) if origin is tuple and ... not in arguments else 1
        yield from ([value] * size for value in outside(arguments[0]))


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_number_without_a_range_is_finite_from_a_caller_by_hand(entry: Entry[Any]) -> None:
    for name, parameter in entry.parameters[1].items():
        if parameter.annotation is float:
            for bad in (math.nan, math.inf, -math.inf):
                with pytest.raises(RecipeError, match=rf"^{name} is .*, expected a finite number"):
                    entry.function(**{name: bad})


@pytest.mark.parametrize("function", public())
def test_a_number_out_of_its_range_is_refused_from_a_caller_by_hand(function: Any) -> None:
    for name, parameter in readable(function).items():
        for bad in outside(parameter.annotation):
            if not isinstance(bad, list) or parameter.kind is parameter.KEYWORD_ONLY or isinstance(function, type):
                with pytest.raises(RecipeError, match=rf"^{name} is .*, expected "):
                    function(**{name: bad})
