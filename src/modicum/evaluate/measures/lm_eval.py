"""A task of the LM Evaluation Harness on data of this machine, scored by the harness itself."""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from modicum.borders import LARGEST, expanded
from modicum.data_files import of_loader, whole
from modicum.errors import CheckpointError, MissingExtraError, RecipeError, did_you_mean, first_line
from modicum.evaluate.intervals import Estimate, mean, mean_score, paired_proportions
from modicum.evaluate.rows import Rows
from modicum.evaluate.subject import Result, Subject
from modicum.registry import measure
from modicum.types import NonNegativeInt, PositiveInt

USUAL = ("acc_norm", "acc", "exact_match", "prompt_level_strict_acc", "f1", "pass@1")  # the first that a task has

HUB = "dataset:"  # how a reference to a data set of the Hub begins


def _asked(_load: Callable[[], Rows], *, task: str, data_path: str) -> Rows:
    """Return the name of the task and its folder: the harness reads the data by itself."""
    if not expanded(data_path).is_dir():
        raise CheckpointError(f"{data_path} is not a folder, expected one that holds the YAML file of task {task!r}.")
    return Rows("text", [{"text": task, "folder": data_path}])


class _Code(str):
    """A function of a Python file, by its name in a definition."""

    __slots__ = ()


class _Loader(yaml.SafeLoader):
    """YAML of the harness, whose functions are not loaded."""


_Loader.add_constructor("!function", lambda _, node: _Code(str(getattr(node, "value", ""))))


def _brings(*, task: str, data_path: str) -> Iterator[str]:
    """Yield what the definition of a task names outside of its folder: data, other definitions, code beside those."""
    folder = expanded(data_path)
    for definition, files in _definitions(task, folder):
        yield from (str(file) for file in files if not file.resolve().is_relative_to(folder.resolve()))
        yield from _data_of(definition)


def _definitions(task: str, folder: Path) -> Iterator[tuple[dict[str, Any], list[Path]]]:
    """Yield every definition of a task in a folder, and the files that it is made of."""
    for path in sorted(folder.rglob("*.yaml")) if folder.is_dir() else ():
        files: list[Path] = []
        definition = _read(path, files)
        if definition.get("task") == task:
            yield definition, files


def _read(path: Path, files: list[Path]) -> dict[str, Any]:
    """Return a definition with what it includes, and put all of its files into ``files``.

    What is wrong with it is for the harness to say.
    """
    if path in files or not path.is_file() or path.stat().st_size > LARGEST:
        return {}
    files.append(path)
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a safe one
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    found: dict[str, Any] = {}
    left = [own]
    own = own if isinstance(own, dict) else {}
    included = own.pop("include", [])
    for name in included if isinstance(included, list) else [included]:
        found |= _read(path.parent / str(name), files)
    while left:
        value = left.pop()
        if isinstance(value, _Code):
            code = path.parent / f"{value.rpartition('.')[0].replace('.', '/')}.py"
            files += [code] if code.is_file() else []
        left += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return found | own


def _data_of(definition: Mapping[str, Any]) -> Iterator[str]:
    """Yield the data of a definition, which ``datasets`` loads."""
    name, arguments = definition.get("dataset_path"), definition.get("dataset_kwargs")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    if isinstance(name, str) and "\0" not in name:
        revision = arguments.get("revision")
        if expanded(name).exists():
            yield from whole(name)
        elif "/" in name:
            yield f"{HUB}{name}@{revision}" if isinstance(revision, str) else f"{HUB}{name}"
    yield from of_loader(arguments)


def _estimate(items: Sequence[Result], *, level: float) -> Estimate:
    return mean_score([item["score"] for item in items], level=level)


def _difference(a: Sequence[Result], b: Sequence[Result], *, level: float) -> Estimate:
    if {item["score"] for item in (*a, *b)} <= {0.0, 1.0}:
        return paired_proportions(*([item["score"] == 1.0 for item in items] for items in (a, b)), level=level)
    return mean([x["score"] - y["score"] for x, y in zip(a, b, strict=True)], level=level)


def _details(items: Sequence[Result]) -> dict[str, Any]:
    return {"harness_metric": items[0]["metric"]}


def _work(_count: int, *, task: str) -> str:
    return f"task {task} of the LM Evaluation Harness"


@measure(
    "lm_eval",
    rows="text",
    metric="harness_score",
    better="higher",
    unit="share",
    prepare=_asked,
    brings=_brings,
    estimate=_estimate,
    difference=_difference,
    details=_details,
    work=_work,
)
def lm_eval(
    rows: Rows,
    subject: Subject,
    *,
    score: str | None = None,
    shots: NonNegativeInt | None = None,
    limit: PositiveInt | None = None,
    chat: bool = True,
    unsafe_code: bool = False,
    batch_size: PositiveInt = 8,
    seed: int,
) -> list[Result]:
    """Run one task of the LM Evaluation Harness whose definition and data lie in a folder of this machine.

    ``data`` names the folder with the task's YAML file, in the harness' own format; its ``dataset_path`` is ``json``,
    ``csv``, ``parquet`` or a local folder. Nothing is downloaded. A definition may name functions of Python files
    beside it, which are run.

    Args:
        rows: Name and folder of the task.
        subject: The model.
        task: Name of the task.
        score: Which of the harness' metrics counts; the first of the usual ones when not given. Higher must be better.
        shots: Examples before each question; as the task says when not given.
        limit: Read so many questions alone.
        chat: Put questions into the model's chat template, where it has one.
        unsafe_code: Run the programs that the model writes, on this machine, for tasks such as HumanEval. Only in a
            place that may be lost.
        batch_size: Questions at a time.
        seed: Of the choice of examples.

    Returns:
        The score of each question.

    Raises:
        MissingExtraError: The harness is not installed.
        RecipeError: There is no such task or metric, or the task runs code and was not allowed to.
        CheckpointError: Its data cannot be read here.

    Example:
        >>> from modicum.registry import measure
        >>> measure["lm_eval"].facts.unit
        'share'

    Cost:
        The harness': a forward pass for each candidate, or a generation for each question.

    Reference:
        L. Gao et al., "A framework for few-shot language model evaluation", 2021, the harness' repository.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise MissingExtraError("lm-eval", "eval") from None
    name, folder = rows.rows[0]["text"], rows.rows[0]["folder"]
    tasks = TaskManager(include_path=folder, include_defaults=False)
    if name not in tasks.all_subtasks:
        raise RecipeError(f"{folder} defines no task {name!r} of the harness. {did_you_mean(name, tasks.all_subtasks)}")
    named = [name for definition, _ in _definitions(name, expanded(folder)) for name in _data_of(definition)]
    with _offline(unsafe_code=unsafe_code, anew=not any(name.startswith(HUB) for name in named)):
        try:
            found = simple_evaluate(
                model=_by_context(HFLM, subject.model)(
                    pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size
                ),
                tasks=[name],
                task_manager=tasks,
                num_fewshot=shots,
                limit=limit,
                bootstrap_iters=0,
                apply_chat_template=chat and bool(subject.tokenizer.chat_template),
                fewshot_random_seed=seed,
                confirm_run_unsafe_code=unsafe_code,
            )
        except (OSError, ValueError, ConnectionError, AttributeError, KeyError, TypeError) as error:
            if "unsafe" in str(error).lower():
                raise RecipeError(
                    f"Task {name} runs programs that the model writes. Set unsafe_code: true to allow it, in a place "
                    "that may be lost."
                ) from None
            raise CheckpointError(f"Task {name} of the harness cannot be run: {first_line(error)}") from None
    return _items(name, found["samples"][name], score)


def _by_context(harness: Any, model: Any) -> Any:
    """Return the harness' class, for a routed model with its experts chosen by the context of a candidate alone."""
    from modicum.evaluate.generation import requests

    if not hasattr(model, "requests"):
        return harness

    class Routed(harness):
        def _loglikelihood_tokens(self, asked: Sequence[Any], *args: Any, **options: Any) -> list[Any]:
            found: dict[int, Any] = {}
            for numbers, within in requests(model, [context for _, context, _ in asked]):
                with within:
                    part = super()._loglikelihood_tokens([asked[i] for i in numbers], *args, **options)
                found |= dict(zip(numbers, part, strict=True))
            return [found[i] for i in range(len(asked))]

    return Routed


def _items(name: str, samples: Sequence[dict[str, Any]], score: str | None) -> list[Result]:
    """Return the scores of all questions, in their order; where answers are read in several ways, the first counts."""
    if not samples:
        raise CheckpointError(f"Task {name} of the harness has no questions.")
    first = samples[0].get("filter")
    kept = sorted((one for one in samples if one.get("filter") == first), key=lambda one: int(one["doc_id"]))
    known = [str(metric) for metric in kept[0].get("metrics", ())]
    chosen = score or next((metric for metric in (*USUAL, *known) if metric in known), None)
    if chosen not in known:
        raise RecipeError(f"Task {name} has no metric {chosen!r}. {did_you_mean(str(chosen), known)}")
    items = []
    for index, one in enumerate(kept):
        value = one[chosen]
        if not isinstance(value, bool | int | float) or not math.isfinite(value):
            raise RecipeError(f"Task {name}: {chosen} of a question is {value!r:.40}, expected a number. Name a score.")
        items.append({"index": index, "metric": chosen, "score": float(value)})
    return items


@contextmanager
def _offline(*, unsafe_code: bool, anew: bool) -> Iterator[None]:
    """Keep the harness from downloading, and let its metrics run code only where that was asked for.

    Args:
        unsafe_code: It was.
        anew: Read files anew: the cache of ``datasets`` knows them by their names and times alone.
    """
    # The harness has imported both; measures know neither.
    data, hub = (sys.modules.get(name) for name in ("datasets.config", "huggingface_hub.constants"))
    allowed = os.environ.get("HF_ALLOW_CODE_EVAL")
    with tempfile.TemporaryDirectory(prefix="modicum-") as cache:
        settings: list[tuple[Any, str, object]] = [(data, "HF_HUB_OFFLINE", True), (hub, "HF_HUB_OFFLINE", True)]
        settings += [(data, "HF_DATASETS_CACHE", Path(cache))] if anew else []
        before = [(place, key, getattr(place, key)) for place, key, _ in settings if hasattr(place, key)]
        for place, key, value in settings:
            if hasattr(place, key):
                setattr(place, key, value)
        if unsafe_code:
            os.environ["HF_ALLOW_CODE_EVAL"] = "1"
        try:
            yield
        finally:
            for place, key, value in before:
                setattr(place, key, value)
            if unsafe_code:
                os.environ.pop("HF_ALLOW_CODE_EVAL")
                if allowed is not None:
                    os.environ["HF_ALLOW_CODE_EVAL"] = allowed
