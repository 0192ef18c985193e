"""The tasks on which zeroth-order fine-tuning is compared: data, prompts, candidates, and how an answer is scored.

Prompts follow the published large-model suite, and answers are compared by SQuAD's normalisation, as there. Data comes
from ``datasets``: a Hub id, or a folder of ``save_to_disk``.
Three further tasks, ``polarity``, ``parity`` and ``order``, are made from a seed and need no download.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch

from modicum.data_files import whole
from modicum.errors import CheckpointError, RecipeError, did_you_mean
from modicum.evaluate.measures.exact_match import exact_match, f1
from modicum.evaluate.rows import Rows
from modicum.jobs.data.made import MADE
from modicum.jobs.data.made import MADE_SIZE as PAIRS
from modicum.jobs.data.section import DataSection
from modicum.random import generator
from modicum.registry import source

MADE_SIZE = 500  # rows of a made task when the recipe does not say
Row: TypeAlias = Mapping[str, Any]
Metric: TypeAlias = Literal["accuracy", "f1", "exact_match"]

YES_NO, NO_YES = ("Yes", "No"), ("No", "Yes")


@dataclass(frozen=True)
class Example:
    """One question.

    Args:
        prompt: The text before the answer.
        candidates: Continuations to choose from; empty when the answer is generated.
        answer: Position of the right candidate (the first of several right ones).
        references: Right answers of a generated task, or of one with several right candidates.
    """

    prompt: str
    candidates: tuple[str, ...] = ()
    answer: int = 0
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task: where its rows are, and how they become examples.

    Args:
        path: Hub id, or empty for a task that is made from a seed.
        config: Name of the Hub configuration.
        render: Turns a row into an example.
        metric: How answers are scored.
        train: ``labels`` learns to choose among the candidates, ``text`` to write the right one.
    """

    path: str
    config: str | None
    render: Callable[[Row], Example]
    metric: Metric = "accuracy"
    train: Literal["labels", "text"] = "labels"


def _choice(template: str, candidates: Sequence[str]) -> Callable[[Row], Example]:
    return lambda row: Example(template.format(**row), tuple(candidates), int(row["label"]))


def _boolq(row: Row) -> Example:
    question = row["question"][:1].upper() + row["question"][1:]
    question += "" if question.endswith("?") else "?"
    return Example(
        f"{row['passage']} {question}\n", ("No", "Yes"), int(row["answer"] if "answer" in row else row["label"])
    )


def _copa(row: Row) -> Example:
    link = {"cause": "because", "effect": "so"}[row["question"]]
    premise = row["premise"].rstrip(". ")
    choices = (row["choice1"], row["choice2"])
    return Example(f"{premise} {link} ", tuple(c[:1].lower() + c[1:] for c in choices), int(row["label"]))


def _record(row: Row) -> Example:
    passage = row["passage"].replace("@highlight\n", "- ")
    candidates = tuple(row["query"].replace("@placeholder", entity) for entity in row["entities"])
    right = [i for i, entity in enumerate(row["entities"]) if entity in row["answers"]]
    if not right:
        raise CheckpointError(f"record: none of the answers {list(row['answers'])} is among the row's entities.")
    return Example(f"{passage}\n- ", candidates, right[0], tuple(row["answers"]))


def _squad(row: Row) -> Example:
    prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return Example(prompt, references=tuple(row["answers"]["text"]))


def _drop(row: Row) -> Example:
    prompt = f"Passage: {row['passage']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return Example(prompt, references=tuple(row["answers_spans"]["spans"]))


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "sst2": Task("nyu-mll/glue", "sst2", _choice("{sentence} It was", (" terrible", " great"))),
        "rte": Task(
            "aps/super_glue",
            "rte",
            _choice('{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n', YES_NO),
        ),
        "cb": Task(
            "aps/super_glue",
            "cb",
            _choice('Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n', ("Yes", "No", "Maybe")),
        ),
        "boolq": Task("aps/super_glue", "boolq", _boolq),
        "wsc": Task(
            "aps/super_glue",
            "wsc.fixed",
            _choice(
                '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? Yes or No?\n',
                NO_YES,
            ),
        ),
        "wic": Task(
            "aps/super_glue",
            "wic",
            _choice(
                'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
                "{sentence1}\n{sentence2}\n",
                NO_YES,
            ),
        ),
        "multirc": Task(
            "aps/super_glue",
            "multirc",
            _choice(
                '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
                NO_YES,
            ),
        ),
        "copa": Task("aps/super_glue", "copa", _copa, train="text"),
        "record": Task("aps/super_glue", "record", _record, train="text"),
        "squad": Task("rajpurkar/squad", None, _squad, "f1", "text"),
        "drop": Task("ucinlp/drop", None, _drop, "f1", "text"),
        "polarity": Task("", None, _choice("{sentence} It was", (" terrible", " great"))),
        "parity": Task("", None, _choice("The number {number} is", (" even", " odd"))),
        "order": Task("", None, _choice("Compared with {other}, {number} is", (" smaller", " larger"))),
    }
)

GOOD = ("wonderful", "moving", "clever", "warm", "funny", "brilliant", "charming", "fresh", "gripping", "lovely")
BAD = ("dull", "clumsy", "tired", "cold", "boring", "messy", "shallow", "stale", "awful", "tedious")
PARTS = ("story", "cast", "music", "script", "ending", "dialogue", "camera work", "pace")


def task_examples(
    name: str, *, split: str = "train", size: int, seed: int = 0, path: str | None = None
) -> list[Example]:
    """Return examples of a task.

    Args:
        name: A key of :data:`TASKS`.
        split: Split of the data; made tasks draw other rows for another split.
        size: How many; made tasks make them, others take the first ones of a seeded shuffle.
        seed: Seed of the choice.
        path: Folder of a saved data set, instead of the Hub.

    Raises:
        RecipeError: There is no such task.
        CheckpointError: The data cannot be read, or its rows lack a field.

    Example:
        >>> task_examples("parity", size=1)[0].candidates
        (' even', ' odd')
    """
    if name not in TASKS:
        raise RecipeError(f"There is no task {name!r}. {did_you_mean(name, TASKS)}")
    task = TASKS[name]
    if not task.path and path is None:
        return [task.render(row) for row in _made(name, split, size, seed)]
    rows = _rows(path or task.path, task.config if path is None else None, split)
    order = torch.randperm(len(rows), generator=generator(seed, "task", name, split))[:size].tolist()
    try:
        return [task.render(rows[index]) for index in order]
    except KeyError as error:
        raise CheckpointError(
            f"{name}: rows of {path or task.path} have no {error}. Is this the right data set?"
        ) from None


def _saved(section: DataSection, name: str) -> Iterator[str]:
    if "path" in section.config:
        yield from whole(str(section.config["path"]))
    elif name in TASKS and TASKS[name].path:
        yield f"dataset:{TASKS[name].path}"


@source("task", inputs=_saved)
def task_rows(
    section: DataSection, name: str, *, shots: int | None = None, path: str | None = None, seed: int = 0
) -> Rows | list[dict[str, Any]]:
    """Return a task of the large-model suite, with a scorer of answers, or a set of pairs that is made from the seed.

    ``task:instructions`` and ``task:unanswerable`` hold pairs of answers, and what the measures ``instructions`` and
    ``decline`` ask of an answer.

    Args:
        section: ``split``, ``size`` and ``template`` are read.
        name: A key of :data:`TASKS`, or a set of :mod:`modicum.jobs.data.made`.
        shots: Keep so many examples of each answer, chosen by the seed.
        path: Folder of a saved data set, instead of the Hub.
        seed: Seed of the choice.

    Raises:
        RecipeError: There is no such task, or a setting that tasks do not have.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> task_rows(DataSection(path="task:parity", size=1), "parity").rows[0]["candidates"]
        (' even', ' odd')

    Cost:
        Rows of the Hub's data set are loaded whole once, through the cache of ``datasets``.

    Deviates:
        ``polarity``, ``parity`` and ``order`` are made from the seed and belong to no published suite.

    Reference:
        S. Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", arXiv:2305.17333.
    """
    if name in MADE:
        if shots is not None or path is not None:
            raise RecipeError(f"{section.path} is made from the seed, without shots or path. Drop config.")
        return MADE[name](section.split, section.size or PAIRS, seed)
    if section.system is not None:
        raise RecipeError(f"{section.path}: a task's prompt is continued as it is, without a system message. Drop it.")
    every = MADE_SIZE if path is None and not (name in TASKS and TASKS[name].path) else sys.maxsize
    examples = task_examples(name, split=section.split, size=section.size or every, seed=seed, path=path)
    if shots is not None:
        if shots < 1:
            raise RecipeError(f"{section.path}: config.shots is {shots!r}, expected a whole number of at least 1.")
        examples = k_shot(examples, shots, seed=seed)
    rows: list[dict[str, Any]] = [
        {
            "prompt": section.template.replace("{prompt}", example.prompt),
            "completion": example.candidates[example.answer] if example.candidates else f" {example.references[0]}\n",
            "candidates": example.candidates,
            "answer": example.answer,
            "references": list(example.references or [example.candidates[example.answer]]),
            "plain": True,  # continued as it is: no chat template, no token of the end
        }
        for example in examples
    ]
    by_words = TASKS[name].metric == "f1"

    def score(index: int, answer: str) -> float:
        references = rows[index]["references"]
        return f1(answer, references) if by_words else float(exact_match(answer, references, normalization="squad"))

    return Rows("completion", rows, score, normalization="squad")


def k_shot(examples: Iterable[Example], k: int, *, seed: int = 0) -> list[Example]:
    """Return ``k`` examples of each answer, chosen by the seed, in an order chosen by the seed.

    Raises:
        CheckpointError: An answer has fewer than ``k`` examples.

    Example:
        >>> [e.answer for e in k_shot(task_examples("parity", size=50), 2, seed=1)].count(0)
        2
    """
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[example.answer].append(example)
    rng = generator(seed, "k-shot")
    chosen: list[Example] = []
    for answer, group in sorted(groups.items()):
        if len(group) < k:
            raise CheckpointError(
                f"Only {len(group)} examples have answer {answer}, expected at least {k}. Read more rows."
            )
        chosen += [group[i] for i in torch.randperm(len(group), generator=rng)[:k].tolist()]
    return [chosen[i] for i in torch.randperm(len(chosen), generator=rng).tolist()]


def _rows(path: str, config: str | None, split: str) -> Any:
    from pathlib import Path

    import datasets

    try:
        if Path(path).is_dir() and (Path(path) / "dataset_info.json").exists():
            return datasets.load_from_disk(path)
        if Path(path).is_dir() and (Path(path) / "dataset_dict.json").exists():
            return datasets.load_from_disk(path)[split]
        return datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError, KeyError, ConnectionError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"Cannot read {split} of {path}: {line}") from None


def _made(name: str, split: str, size: int, seed: int) -> list[Row]:
    rng = generator(seed, "task", name, split)

    def pick(items: Sequence[str]) -> str:
        return items[int(torch.randint(len(items), (), generator=rng))]

    rows: list[Row] = []
    for _ in range(size):
        label = int(torch.randint(2, (), generator=rng))
        if name == "parity":
            rows.append({"number": 2 * int(torch.randint(5000, (), generator=rng)) + label, "label": label})
            continue
        if name == "order":
            small, large = sorted((torch.randperm(90, generator=rng)[:2] + 10).tolist())
            number, other = (large, small) if label else (small, large)
            rows.append({"number": number, "other": other, "label": label})
            continue
        words = GOOD if label else BAD
        parts = torch.randperm(len(PARTS), generator=rng)[:2].tolist()
        sentence = f"The {PARTS[parts[0]]} was {pick(words)} and the {PARTS[parts[1]]} was {pick(words)}."
        rows.append({"sentence": sentence, "label": label})
    return rows
