"""Evaluate models on tasks, with confidence intervals and paired comparisons.

A task is a measure (:data:`modicum.registry.measure`), the data that it reads, and its knobs. Every (model, task) pair
is a cell. A cell is written whole when it is done, so a run that was killed goes on with the next one, and nothing that
a cell holds depends on when it was computed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Gt, Lt
from pydantic import Field, field_validator, model_validator

from modicum.borders import border, loads
from modicum.cells import Cell, fill
from modicum.durable import write_atomic
from modicum.errors import CheckpointError, did_you_mean
from modicum.evaluate.rows import Rows
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.loading.models import load_model, load_tokenizer, native_bfloat16, rehearse_loading, usable
from modicum.jobs.loading.references import resolve_model
from modicum.jobs.subject import LocalSubject, supplied
from modicum.jobs.task import Task
from modicum.recipe import Recipe
from modicum.record import Run, read_log
from modicum.registry import job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from modicum.evaluate.subject import Result, Subject

Progress: TypeAlias = Callable[[float], None]


class EvaluateRecipe(Recipe):
    """Which models, on which tasks."""

    job: Literal["evaluate"] = "evaluate"
    models: dict[str, str] = Field(min_length=1, description="name: folder, Hub id or builtin; or model: one of these")
    tasks: dict[str, Task] = Field(min_length=1, description="name: a measure as `kind`, its data, and its knobs")
    baseline: str | None = Field(default=None, description="model that the others are compared with; the first one")
    trained_on: list[DataSection] | None = Field(
        default=None, description="data of the models' training; a task that asks what it teaches is refused"
    )
    level: Annotated[float, Gt(0), Lt(1)] = Field(default=0.95, description="confidence of the intervals")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own where the device computes in it, else float32"
    )
    device: str = Field(
        default="auto",
        description="where the models compute, for example cuda; auto: an accelerator where there is one",
    )
    cached_blocks: PositiveInt | None = Field(
        default=None,
        description="lowest blocks whose states of pairs and choices a process keeps for models that are equal there",
    )
    allow_pickle: bool = False
    remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "model" in value and "models" not in value:
            rest = {key: item for key, item in value.items() if key != "model"}
            return {**rest, "models": {"model": value["model"]}}
        return value

    @field_validator("trained_on", mode="before")
    @classmethod
    def _one_section(cls, value: Any) -> Any:
        sections = [value] if isinstance(value, str | Mapping) else value
        if not isinstance(sections, list):
            return sections
        return [{"path": section} if isinstance(section, str) else section for section in sections]

    @field_validator("models", "tasks")
    @classmethod
    def _names_are_file_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name or set(name) & set("/\\\0") or name.startswith("."):
                raise ValueError(f"{name!r} cannot be a name, expected letters, digits, - and _")
        trimmed: dict[str, str] = {}
        for name in value:
            if (other := trimmed.setdefault(name.strip(), name)) != name:
                raise ValueError(f"{other!r} and {name!r} are one name but for white space. Rename one")
        return value

    @model_validator(mode="after")
    def _names_fit(self) -> EvaluateRecipe:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(
                f"baseline {self.baseline!r} is not among the models. {did_you_mean(self.baseline, self.models)}"
            )
        files = {f"{model}.{task}" for model in self.models for task in self.tasks}
        if len(files) < len(self.models) * len(self.tasks):
            raise ValueError("names of models and tasks, joined by a dot, are not all different. Rename one")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the models and the data."""
        yield from self.models.values()
        for task in self.tasks.values():
            yield from task.inputs()
        for section in self.trained_on or ():
            yield from section.inputs()


def plan(recipe: EvaluateRecipe) -> list[str]:
    """Describe the evaluation; reads the data, but no weights."""
    lines = []
    read = {name: task.rows(recipe.seed) for name, task in recipe.tasks.items()}
    _refuse_taught(recipe, read)
    for name, task in recipe.tasks.items():
        count = len(read[name])
        work = task.ask(task.measure.facts.work, count) or f"{task.metric} of {count} rows"
        lines.append(f"{name}: {work} from each of {len(recipe.models)} models ({task.data.path})")
    for name, reference in recipe.models.items():
        model = rehearse_loading(reference, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
        subject = LocalSubject(name, model, load_tokenizer(reference, remote_code=recipe.remote_code))
        for called, task in recipe.tasks.items():
            subject.rehearsed(task, read[called], seed=recipe.seed, level=recipe.level)
        size = sum(file.stat().st_size for file in resolve_model(reference).glob("*.safetensors"))
        lines.append(f"read {name} from {reference} ({size / 1e6:.0f} MB of weights)")
    return lines


@job("evaluate", plan=plan, outputs=lambda _: ["items"], foreseeable=lambda _: True)
def evaluate(recipe: EvaluateRecipe, run: Run) -> None:
    """Evaluate each model on each task.

    Args:
        recipe: Models and tasks.
        run: Where the results go: ``record.json`` holds a cell for each model and task and the paired differences from
            the baseline, ``items/`` the answers and scores one by one.
    """
    finished = Finished(run)
    pairs = {_key(model, task): (model, task) for model in recipe.models for task in recipe.tasks}
    todo = [pair for key, pair in pairs.items() if key not in finished]
    # A wrong reference in the last line of a recipe should not cost the hours before it.
    rows = {name: recipe.tasks[name].rows(recipe.seed, run.note) for name in dict.fromkeys(name for _, name in todo)}
    _refuse_taught(recipe, rows)
    for model in dict.fromkeys(model for model, _ in todo):
        resolve_model(recipe.models[model], allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
    run.inputs.check()
    (run.folder / "items").mkdir(exist_ok=True)
    loaded: list[LocalSubject] = []
    others = supplied(lambda reference: _subject(recipe, "reference", reference, lambda _: None, run.note))
    given = {**others, "seed": recipe.seed, "level": recipe.level}

    def keep(**more: Any) -> None:
        cells = [_described(recipe, finished[key]) for key in pairs if key in finished]
        run.record["metrics"] = {"cells": cells, **more}
        run.save()

    def tell(_: str, cell: Cell) -> None:
        run.say(_line(cell))
        keep()

    with _progress_bar(len(pairs), len(pairs) - len(todo), quiet=run.quiet) as step:

        def cell(model: str, name: str) -> Cell:
            if [subject.name for subject in loaded] != [model]:
                loaded.clear()  # frees the memory of the model before
                loaded.append(_subject(recipe, model, recipe.models[model], step, run.note))
                run.inputs.check()
            task, began = recipe.tasks[name], time.monotonic()
            with getattr(getattr(loaded[0], "model", None), "counted", nullcontext)() as spent:
                items = _measure(loaded[0], task, rows[name], given)
            run.inputs.check_mapped()
            _write_items(run, _key(model, name), items)
            found = task.ask(task.measure.facts.estimate, items, **given)._asdict()
            refuse_not_finite(model, name, task.metric, found)
            details = task.ask(task.measure.facts.details, items, **given) or {}
            # Loading the model is no part of the time: a later cell of the same model would seem faster.
            seconds = round(time.monotonic() - began, 3)
            if spent is not None:  # a model that may stop early says what that was worth
                details = {**details, "spent": spent.facts()}
            return {"model": model, "task": name, "metric": task.metric, **found, "seconds": seconds, **details}

        fill(finished, {key: partial(cell, *pair) for key, pair in pairs.items()}, tell=tell)
    keep(pairs=_differences(recipe, run), level=recipe.level)
    run.output("items", run.folder / "items")


class Finished:
    """Finished cells of a run: a line of its log each, written after the file of the cell's items."""

    def __init__(self, run: Run) -> None:
        self._run = run
        lines = read_log(run.folder, "cell", model=str, task=str)
        self._cells = {_key(line["model"], line["task"]): _plain(line) for line in lines}

    def __contains__(self, key: object) -> bool:
        return key in self._cells and _items_file(self._run, str(key)).is_file()

    def __getitem__(self, key: str) -> Cell:
        return self._cells[key]

    def __setitem__(self, key: str, cell: Cell) -> None:
        self._run.log("cell", **cell)
        self._cells[key] = cell


def _refuse_taught(recipe: EvaluateRecipe, rows: Mapping[str, Rows]) -> None:
    """Refuse a task whose questions the models have learned."""
    from modicum.jobs.data.overlap import check_apart

    for number, section in enumerate(recipe.trained_on or ()):
        taught = load_rows(section, seed=recipe.seed)
        for name, asked in rows.items():
            check_apart(taught, asked, names=(f"trained_on.{number}", f"tasks.{name}"))


def _measure(subject: Subject, task: Task, rows: Rows, given: Mapping[str, Any]) -> list[Result]:
    items: list[Result] = task.ask(task.measure.function, rows, subject, **given)
    return items


def refuse_not_finite(model: str, task: str, metric: str, found: Mapping[str, Any]) -> None:
    """Refuse a value of a measure that is not finite.

    Raises:
        CheckpointError: It is not.
    """
    if isinstance(found["value"], float) and not math.isfinite(found["value"]):
        raise CheckpointError(
            f"{model} on {task}: {metric} is {found['value']}, so the model's own numbers overflow. Evaluate it with "
            "dtype: float32, or leave it out."
        )


def _subject(
    recipe: EvaluateRecipe, name: str, reference: str, progress: Progress, note: Callable[[str], None]
) -> LocalSubject:
    device = usable_device(recipe.device)
    dtype = native_dtype(recipe.dtype, device)
    model = load_model(
        reference, dtype=dtype, device=device, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code
    )
    tokenizer = load_tokenizer(reference, remote_code=recipe.remote_code)
    return LocalSubject(name, model, tokenizer, progress, recipe.cached_blocks, note)


def native_dtype(dtype: str, device: str) -> str:
    """Return the dtype to load in: of ``auto`` the checkpoint's own only where the device computes in it."""
    return "float32" if dtype == "auto" and not native_bfloat16(device) else dtype


def usable_device(name: str) -> str:
    """Return the device that a recipe names, ``auto`` for the accelerator where there is one.

    Raises:
        RecipeError: It cannot be used here.
    """
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator else "cpu"
    usable("auto", name)
    return name


def _described(recipe: EvaluateRecipe, cell: Mapping[str, Any]) -> Cell:
    """Return a cell or difference with the direction and unit of its metric, by which readers rank and write it."""
    facts = recipe.tasks[cell["task"]].measure.facts
    return {**cell, "better": facts.better, "unit": facts.unit}


def _differences(recipe: EvaluateRecipe, run: Run) -> list[Cell]:
    """Compare each model with the baseline on the same items."""
    baseline = recipe.baseline or next(iter(recipe.models))
    found = []
    for name, task in recipe.tasks.items():
        facts = task.measure.facts
        reference = _read_items(run, _key(baseline, name))
        for model in recipe.models:
            if model == baseline:
                continue
            own = _read_items(run, _key(model, name))
            difference, low, high, n = task.ask(facts.difference, own, reference, level=recipe.level)
            pair = {"a": model, "b": baseline, "task": name, "metric": facts.compares or task.metric}
            pair |= {"difference": difference, "low": low, "high": high, "n": n}
            found.append(_described(recipe, pair))
    return found


def _key(model: str, task: str) -> str:
    return f"{model}.{task}"


def _items_file(run: Run, key: str) -> Path:
    return run.folder / "items" / f"{key}.jsonl"


def _write_items(run: Run, key: str, items: Sequence[Result]) -> None:
    write_atomic(_items_file(run, key), "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def _read_items(run: Run, key: str) -> list[Result]:
    file = _items_file(run, key)
    with border(file, "Delete it and run again: its cell is measured anew."):
        items = [loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        if not all(isinstance(item, dict) for item in items):
            raise TypeError("a line is no mapping")
    return items


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("event", "time")}


def _line(cell: Mapping[str, Any]) -> str:
    interval = "" if cell["low"] is None else f" [{cell['low']:.3g}, {cell['high']:.3g}]"
    spent = cell.get("spent") or {}
    saved = "" if spent.get("time_saved") is None else f", {spent['time_saved']:.0%} of the time saved by leaving early"
    cycles = "" if spent.get("mean_cycles") is None else f", {spent['mean_cycles']:.2f} cycles a token{saved}"
    return (
        f"{cell['model']} on {cell['task']}: {cell['metric']} {cell['value']:.3g}{interval}, "
        f"n = {cell['n']}, {cell['seconds']:.1f} s{cycles}"
    )


@contextmanager
def _progress_bar(cells: int, done: int, *, quiet: bool) -> Iterator[Progress]:
    """Give a function that moves a bar with the estimated time on by a share of one cell."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("evaluate"),
        BarColumn(),
        TextColumn("{task.percentage:.0f} %"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=cells, completed=done)
        yield lambda share: bar.advance(task, share)
