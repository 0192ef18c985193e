"""Data for training and evaluation, from anywhere, as rows of one kind.

Nothing is left in a cache: local files and generated tasks are read straight into memory. Only a Hub id goes through
``datasets.load_dataset``. The same section and seed give the same rows everywhere.
"""

from __future__ import annotations

from pathlib import Path

from modicum.errors import CheckpointError, RecipeError
from modicum.jobs.data import sources
from modicum.jobs.data.section import DataSection, Fields, Kind, Row, Rows
from modicum.jobs.data.tokens import LabelledLogits, PaddingCollator, collate, tokenize

__all__ = ["DataSection", "Fields", "LabelledLogits", "PaddingCollator", "Rows", "collate", "load_rows", "tokenize"]


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
        from modicum.jobs.data.tasks import task_rows

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
