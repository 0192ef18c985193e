"""Data for training and evaluation, from anywhere, as rows of three kinds.

==============  ====================================================
``text``        ``{"text": str}``
``chat``        ``{"messages": [{"role": …, "content": …}, …]}``
``completion``  ``{"prompt": str, "completion": str}``
==============  ====================================================

Nothing is left in a cache: local files and generated tasks are read straight into memory. Only a Hub id goes through
``datasets.load_dataset``. The same section and seed give the same rows everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator

from modicum.errors import CheckpointError, RecipeError
from modicum.jobs import sources
from modicum.jobs.tokens import LabelledLogits, PaddingCollator, collate, tokenize
from modicum.recipe import Section
from modicum.types import NonNegativeInt, PositiveInt

__all__ = ["DataSection", "Fields", "LabelledLogits", "PaddingCollator", "Rows", "collate", "load_rows", "tokenize"]

Row: TypeAlias = dict[str, Any]
Kind: TypeAlias = Literal["text", "chat", "completion"]


class Fields(Section):
    """Names of the fields in the user's files."""

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"


class DataSection(Section):
    """Where rows come from, and how they become prompts and labels."""

    path: str = Field(
        description="file (jsonl, json, parquet, txt), folder, Hub id, reasoning-gym:TASK, task:NAME or builtin:NAME"
    )
    split: str = "train"
    size: PositiveInt | None = Field(default=None, description="rows to generate, or at most to read")
    shuffle: bool = Field(default=False, description="shuffle before the first `size` rows are taken")
    seed: NonNegativeInt | None = Field(default=None, description="the recipe's seed when not given")
    config: dict[str, Any] = Field(
        default_factory=dict, description="knobs of a reasoning-gym task or a task, or arguments of load_dataset"
    )
    format: Literal["auto", "text", "chat", "completion"] = "auto"
    fields: Fields = Fields()
    system: str | None = Field(default=None, description="system message put before every prompt or chat")
    template: str = Field(default="{prompt}", description="text around every prompt")
    max_length: PositiveInt = Field(default=1024, description="tokens of a row; longer ones are cut")
    packing: bool = Field(default=False, description="fill rows up to max_length with several samples")
    completion_only: bool = Field(default=True, description="learn from the assistant's words only")

    @field_validator("template")
    @classmethod
    def _holds_the_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("expected a text that holds {prompt}")
        return value

    @property
    def is_local(self) -> bool:
        """Whether the path is a file or folder on this machine."""
        return ":" not in self.path and Path(self.path).expanduser().exists()

    def inputs(self) -> Iterator[str]:
        """Yield the file or folder, whose content is part of a run's identity."""
        if self.is_local:
            yield self.path
        elif self.path.startswith("task:") and "path" in self.config:
            yield str(self.config["path"])


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, and what can score an answer to one of them.

    Args:
        kind: What every row holds; see the module.
        rows: The rows.
        score: From the index of a row and an answer to a number in [0, 1]; ``None`` where only the expected
            completion is known.
    """

    kind: Kind
    rows: list[Row]
    score: Callable[[int, str], float] | None = None

    def __len__(self) -> int:
        return len(self.rows)


def load_rows(section: DataSection, *, seed: int = 0) -> Rows:
    """Read or generate the rows of ``section``.

    Args:
        section: What to read.
        seed: Used when the section has no seed of its own.

    Raises:
        CheckpointError: The file, folder, split or task does not exist, is empty or cannot be read.
        RecipeError: The rows do not have the fields that their format needs.
        MissingExtraError: The source needs a package that is not installed.
    """
    seed = seed if section.seed is None else section.seed
    kind, colon, name = section.path.partition(":")
    if colon and kind == "reasoning-gym":
        answers, score = sources.task(section, name, seed)
        return Rows("completion", [_prompted(section, *pair) for pair in answers], score)
    if colon and kind == "task":
        from modicum.jobs.tasks import task_rows

        return Rows("completion", *task_rows(section, name, seed))
    if colon and kind == "builtin":
        raw = sources.builtin(section, name)
    elif section.is_local:
        raw = sources.local(section, Path(section.path).expanduser())
    else:
        raw = sources.hub(section)
    if not raw:
        raise CheckpointError(f"{section.path} (split {section.split!r}) has no rows, expected at least one.")
    if section.shuffle:
        import torch

        from modicum.random import generator

        order = torch.randperm(len(raw), generator=generator(seed, "data", section.split))
        raw = [raw[i] for i in order.tolist()]
    raw = raw[: section.size]
    chosen = _kind(section, raw[0])
    return Rows(chosen, [_row(section, chosen, row, index) for index, row in enumerate(raw)])


def _kind(section: DataSection, row: Row) -> Kind:
    if section.format != "auto":
        return section.format
    fields = section.fields
    if fields.messages in row:
        return "chat"
    if fields.prompt in row and fields.completion in row:
        return "completion"
    if fields.text in row:
        return "text"
    raise RecipeError(
        f"{section.path}: rows have the fields {', '.join(sorted(row)) or 'none'}; expected {fields.messages!r}, "
        f"{fields.prompt!r} and {fields.completion!r}, or {fields.text!r}. Name yours: "
        "fields: {prompt: …, completion: …}"
    )


def _row(section: DataSection, kind: Kind, row: Row, index: int) -> Row:
    """Return ``row`` under our own field names, checked."""
    fields = section.fields
    if kind == "text":
        return {"text": _text(section, row, fields.text, index)}
    if kind == "completion":
        return _prompted(section, *(_text(section, row, name, index) for name in (fields.prompt, fields.completion)))
    messages = row.get(fields.messages)
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise RecipeError(
            f"{section.path}, row {index}: field {fields.messages!r} is {messages!r:.80}, "
            "expected a list of {role: …, content: …}."
        )
    if section.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": section.system}, *messages]
    return {"messages": messages}


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _prompted(section: DataSection, prompt: str, completion: str) -> Row:
    row: Row = {"prompt": section.template.replace("{prompt}", prompt), "completion": completion}
    return {"system": section.system, **row} if section.system is not None else row


def _text(section: DataSection, row: Row, name: str, index: int) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        found = f"is {type(value).__name__}" if name in row else f"is missing (it has {', '.join(sorted(row))})"
        raise RecipeError(f"{section.path}, row {index}: field {name!r} {found}, expected text.")
    return value
