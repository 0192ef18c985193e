"""Evaluate models on tasks, with confidence intervals and paired comparisons.

Every (model, task) pair is a cell. A cell is written whole when it is done, so a run that was killed goes on with the
next one, and nothing that a cell holds depends on when it was computed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from annotated_types import Gt, Lt
from pydantic import Field, field_validator, model_validator

from modicum.errors import RecipeError, did_you_mean
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.rows import DataSection, Rows, load_rows
from modicum.jobs.data.tokens import prompt_ids
from modicum.jobs.loading.models import load_model, load_tokenizer, native_bfloat16
from modicum.jobs.loading.references import resolve_model
from modicum.jobs.retrieval import RetrievalTask, retrieval_grid, retrieval_rows
from modicum.recipe import Recipe, Section
from modicum.record import Run, read_log, write_atomic
from modicum.registry import job
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modicum.evaluate.intervals import Estimate

Item: TypeAlias = dict[str, Any]
Progress: TypeAlias = Callable[[float], None]


class ExactMatchTask(Section):
    """Generate an answer to each prompt; count those that are right.

    A reasoning-gym task judges by its own rules. Elsewhere an answer is right when it equals the completion but for
    case, white space and surrounding punctuation.
    """

    kind: Literal["exact_match"] = "exact_match"
    data: DataSection
    max_new_tokens: PositiveInt = 32
    batch_size: PositiveInt = 32
    answer: str | None = Field(default=None, description="regular expression whose group is the answer; last match")

    @field_validator("answer")
    @classmethod
    def _is_pattern(cls, value: str | None) -> str | None:
        from modicum.evaluate.measures.exact_match import compiled

        if value is not None:
            compiled(value)
        return value


class PerplexityTask(Section):
    """Measure how well a model predicts text, window by window of ``data.max_length`` tokens."""

    kind: Literal["perplexity"] = "perplexity"
    data: DataSection
    metric: Literal["bits_per_byte", "perplexity"] = "bits_per_byte"
    stride: PositiveInt | None = Field(default=None, description="tokens between windows; no overlap when not given")
    max_bytes: PositiveInt | None = Field(default=None, description="read only the beginning of each document")
    batch_size: PositiveInt = 4

    @model_validator(mode="after")
    def _stride_fits(self) -> PerplexityTask:
        if self.data.max_length < 2 or (self.stride or 1) >= self.data.max_length:
            raise ValueError(f"stride {self.stride} must be less than data.max_length {self.data.max_length}")
        return self


AnswerTask: TypeAlias = ExactMatchTask | RetrievalTask  # the model answers, and the answer is scored
Task: TypeAlias = Annotated[AnswerTask | PerplexityTask, Field(discriminator="kind")]


class EvaluateRecipe(Recipe):
    """Which models, on which tasks."""

    job: Literal["evaluate"] = "evaluate"
    models: dict[str, str] = Field(min_length=1, description="name: folder, Hub id or builtin; or model: one of these")
    tasks: dict[str, Task] = Field(min_length=1)
    baseline: str | None = Field(default=None, description="model that the others are compared with; the first one")
    level: Annotated[float, Gt(0), Lt(1)] = Field(default=0.95, description="confidence of the intervals")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own where the device computes in it, else float32"
    )
    device: str = "auto"
    allow_pickle: bool = False
    remote_code: bool = False

    @model_validator(mode="before")
    @classmethod
    def _one_model(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "model" in value and "models" not in value:
            rest = {key: item for key, item in value.items() if key != "model"}
            return {**rest, "models": {"model": value["model"]}}
        return value

    @field_validator("models", "tasks")
    @classmethod
    def _names_are_file_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if not name or set(name) & set("/\\\0") or name.startswith("."):
                raise ValueError(f"{name!r} cannot be a name, expected letters, digits, - and _")
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
            yield from task.data.inputs()
            if isinstance(task, RetrievalTask) and task.file is not None:
                yield task.file


def plan(recipe: EvaluateRecipe) -> list[str]:
    """Say what would be evaluated; reads the data, but no model."""
    lines = []
    for name, task in recipe.tasks.items():
        rows = len(_rows(task, recipe.seed))
        what = (
            f"{rows} answers of at most {task.max_new_tokens} tokens"
            if isinstance(task, AnswerTask)
            else f"{task.metric} of {rows} documents"
        )
        lines.append(f"{name}: {what} from each of {len(recipe.models)} models ({task.data.path})")
    for name, reference in recipe.models.items():
        size = sum(file.stat().st_size for file in resolve_model(reference).glob("*.safetensors"))
        lines.append(f"read {name} from {reference} ({size / 1e6:.0f} MB of weights)")
    return lines


@job("evaluate", plan=plan)
def evaluate(recipe: EvaluateRecipe, run: Run) -> None:
    """Evaluate each model on each task.

    Args:
        recipe: Models and tasks.
        run: Where the results go: ``record.json`` holds a cell for each model and task and the paired differences from
            the baseline, ``items/`` the answers and scores one by one.
    """
    finished = {(line["model"], line["task"]): line for line in read_log(run.folder, "cell")}
    wanted = [(model, task) for model in recipe.models for task in recipe.tasks]
    todo = [cell for cell in wanted if cell not in finished or not _items_file(run, *cell).is_file()]
    # A wrong reference in the last line of a recipe should not cost the hours before it.
    rows = {name: _rows(recipe.tasks[name], recipe.seed) for name in dict.fromkeys(name for _, name in todo)}
    for model in dict.fromkeys(model for model, _ in todo):
        resolve_model(recipe.models[model], allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code)
    (run.folder / "items").mkdir(exist_ok=True)
    subject: Subject | None = None
    with _progress_bar(len(wanted), len(wanted) - len(todo), quiet=run.quiet) as step:
        for model, name in todo:
            if subject is None or subject.name != model:
                subject = None  # frees the one before
                subject = _load(recipe, model)
            task = recipe.tasks[name]
            started = time.monotonic()
            items = _measure(subject, task, rows[name], step)
            _write_items(_items_file(run, model, name), items)
            cell = _cell(model, name, task, items, recipe.level, time.monotonic() - started)
            if isinstance(task, RetrievalTask):
                cell["grid"] = retrieval_grid(rows[name], [item["score"] for item in items])
            finished[model, name] = cell
            run.log("cell", **cell)
            run.say(_line(cell))
            run.record["metrics"] = {"cells": [_plain(finished[cell]) for cell in wanted if cell in finished]}
            run.save()
    run.record["metrics"] = {
        "cells": [_plain(finished[cell]) for cell in wanted],
        "pairs": _pairs(recipe, run),
        "level": recipe.level,
    }
    run.output("items", run.folder / "items")


@dataclass(frozen=True)
class Subject:
    """A loaded model."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def _load(recipe: EvaluateRecipe, name: str) -> Subject:
    device = _device(recipe.device)
    dtype = recipe.dtype
    if dtype == "auto" and not native_bfloat16(device):
        dtype = "float32"
    reference = recipe.models[name]
    model = load_model(
        reference, dtype=dtype, device=device, allow_pickle=recipe.allow_pickle, remote_code=recipe.remote_code
    )
    return Subject(name, model, load_tokenizer(reference, remote_code=recipe.remote_code))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator.type if accelerator else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return name


def _rows(task: Task, seed: int) -> Rows:
    if isinstance(task, RetrievalTask):
        return retrieval_rows(task, seed=seed)
    rows = load_rows(task.data, seed=seed)
    expected = "completion" if isinstance(task, ExactMatchTask) else "text"
    if rows.kind != expected:
        fields = "prompt and completion" if expected == "completion" else "text"
        raise RecipeError(f"{task.data.path} holds {rows.kind} rows; a task of kind {task.kind} needs {fields}.")
    return rows


def _measure(subject: Subject, task: Task, rows: Rows, step: Progress) -> list[Item]:
    if isinstance(task, AnswerTask):
        return _answers(subject, task, rows, step)
    return _likelihoods(subject, task, rows, step)


def _answers(subject: Subject, task: AnswerTask, rows: Rows, step: Progress) -> list[Item]:
    from modicum.evaluate import exact_match, extract, generate, stop_tokens

    answers = generate(
        subject.model,
        [prompt_ids(row, subject.tokenizer) for row in rows.rows],
        max_new_tokens=task.max_new_tokens,
        stop=stop_tokens(subject.model, subject.tokenizer),
        pad=pad_id(subject.tokenizer),
        batch_size=task.batch_size,
        progress=lambda done: step(done / len(rows)),
    )
    items = []
    for index, (row, ids) in enumerate(zip(rows.rows, answers, strict=True)):
        text = subject.tokenizer.decode(ids, skip_special_tokens=True)
        answer, expected = extract(text, task.answer), row["completion"]
        score = rows.score(index, answer) if rows.score else float(exact_match(answer, expected))
        items.append(
            {
                "index": index,
                "prompt": row["prompt"],
                "text": text,
                "answer": answer,
                "expected": expected,
                "score": score,
                # Some tasks give part of a point for an answer in other words; a match is a full point.
                "correct": score >= 1.0,
            }
        )
    return items


def _likelihoods(subject: Subject, task: PerplexityTask, rows: Rows, step: Progress) -> list[Item]:
    from modicum.evaluate import log_likelihoods, windows

    size = task.data.max_length
    stride = task.stride or size - 1
    # Cutting within a character would make bytes that are no text, so what is left of one is dropped.
    texts = [row["text"].encode()[: task.max_bytes].decode(errors="ignore") for row in rows.rows]
    documents = [_document(subject.tokenizer, text) for text in texts]
    total = sum(len(windows(len(document), size=size, stride=stride)) for document in documents)
    nats = log_likelihoods(
        subject.model,
        documents,
        size=size,
        stride=stride,
        pad=pad_id(subject.tokenizer),
        batch_size=task.batch_size,
        progress=lambda done: step(done / total),
    )
    return [
        {"index": index, "nats": value, "tokens": len(document) - 1, "bytes": len(text.encode())}
        for index, (text, document, value) in enumerate(zip(texts, documents, nats, strict=True))
    ]


def _document(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text after one token of context, so that its own first token is scored too."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else pad_id(tokenizer)
    return [start, *ids]


def _cell(model: str, name: str, task: Task, items: Sequence[Item], level: float, seconds: float) -> dict[str, Any]:
    from modicum.evaluate import bits_per_byte, mean, perplexity, wilson

    metric = _metric(task)
    scores = [float(item.get("score", 0.0)) for item in items]
    if metric == "recall" and not {*scores} <= {0.0, 1.0}:
        estimate: Estimate = mean(scores, level=level)
    elif metric in ("exact_match", "recall"):
        estimate = wilson(sum(item["correct"] for item in items), len(items), level=level)
    elif metric == "bits_per_byte":
        estimate = bits_per_byte([item["nats"] for item in items], [item["bytes"] for item in items], level=level)
    else:
        estimate = perplexity([item["nats"] for item in items], [item["tokens"] for item in items], level=level)
    return {"model": model, "task": name, "metric": metric, **estimate._asdict(), "seconds": round(seconds, 3)}


def _metric(task: Task) -> str:
    if isinstance(task, PerplexityTask):
        return task.metric
    return "recall" if isinstance(task, RetrievalTask) else "exact_match"


def _pairs(recipe: EvaluateRecipe, run: Run) -> list[dict[str, Any]]:
    """Compare each model with the baseline on the same items."""
    baseline = recipe.baseline or next(iter(recipe.models))
    pairs = []
    for name, task in recipe.tasks.items():
        reference = _read_items(_items_file(run, baseline, name))
        for model in recipe.models:
            if model == baseline:
                continue
            metric, estimate = _difference(task, _read_items(_items_file(run, model, name)), reference, recipe.level)
            difference = {"difference": estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
            pairs.append({"a": model, "b": baseline, "task": name, "metric": metric, **difference})
    return pairs


def _difference(task: Task, a: Sequence[Item], b: Sequence[Item], level: float) -> tuple[str, Estimate]:
    from modicum.evaluate import bits_per_byte, mean, paired_proportions

    if isinstance(task, RetrievalTask):
        return "recall", mean([x["score"] - y["score"] for x, y in zip(a, b, strict=True)], level=level)
    if isinstance(task, ExactMatchTask):
        solved = ([bool(item["correct"]) for item in items] for items in (a, b))
        return "exact_match", paired_proportions(*solved, level=level)
    # Perplexities of models with different tokenizers count different tokens; bytes are the same for all.
    nats = [x["nats"] - y["nats"] for x, y in zip(a, b, strict=True)]
    return "bits_per_byte", bits_per_byte(nats, [item["bytes"] for item in a], level=level)


def _items_file(run: Run, model: str, task: str) -> Path:
    return run.folder / "items" / f"{model}.{task}.jsonl"


def _write_items(path: Path, items: Sequence[Item]) -> None:
    write_atomic(path, "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in items))


def _read_items(path: Path) -> list[Item]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _plain(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in ("event", "time")}


def _line(cell: Mapping[str, Any]) -> str:
    interval = "" if cell["low"] is None else f" [{cell['low']:.3g}, {cell['high']:.3g}]"
    return (
        f"{cell['model']} on {cell['task']}: {cell['metric']} {cell['value']:.3g}{interval}, "
        f"n = {cell['n']}, {cell['seconds']:.1f} s"
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
