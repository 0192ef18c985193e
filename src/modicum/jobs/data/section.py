"""The section of a recipe that names data: where rows come from, and how they become prompts and labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from modicum.errors import RecipeError, did_you_mean
from modicum.job_facts import SourceFacts
from modicum.recipe import Section
from modicum.registry import Entry, row_kind, source
from modicum.types import NonNegativeInt, PositiveInt


class Fields(Section):
    """Names of the fields in the user's files; a kind of rows with further fields has them here too."""

    model_config = ConfigDict(extra="allow")

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"

    @model_validator(mode="after")
    def _are_known(self) -> Fields:
        for name, value in (self.model_extra or {}).items():
            known = {field for kind in row_kind.values() for field in kind.facts.fields}
            if name not in known:
                raise ValueError(f"unknown field {name!r}. {did_you_mean(name, known)}")
            if not isinstance(value, str):
                raise ValueError(f"{name} is {value!r}, expected the name of a field")
        return self

    def of(self, field: str) -> str:
        """Return the name of ``field`` in the user's files."""
        return str(getattr(self, field, field))


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
    format: str = Field(default="auto", description="kind of the rows; auto: as their fields tell")
    fields: Fields = Fields()
    system: str | None = Field(default=None, description="system message put before every prompt or chat")
    template: str = Field(default="{prompt}", description="text around every prompt")
    max_length: PositiveInt = Field(default=1024, description="tokens of a row; longer ones are cut")
    packing: bool = Field(default=False, description="fill rows up to max_length with several samples")
    completion_only: bool = Field(default=True, description="learn from the assistant's words only")
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="a row that cannot be read or learned from ends the run, or is left out and counted"
    )

    @field_validator("template")
    @classmethod
    def _holds_the_prompt(cls, value: str) -> str:
        if "{prompt}" not in value:
            raise ValueError("expected a text that holds {prompt}")
        return value

    @field_validator("format")
    @classmethod
    def _is_a_kind_of_rows(cls, value: str) -> str:
        if value != "auto" and value not in row_kind:
            raise ValueError(f"{value!r} is no kind of rows. {did_you_mean(value, ['auto', *row_kind])}")
        return value

    @property
    def source(self) -> tuple[Entry[SourceFacts], str]:
        """The source that ``path`` names, and the rest of the path, which is for the source.

        Raises:
            RecipeError: The path begins with the key of a source that does not exist.
        """
        key, colon, name = self.path.partition(":")
        if colon and key in source:
            return source[key], name
        if Path(self.path).expanduser().exists():
            return source["file"], self.path
        if colon and re.fullmatch(r"[a-z][a-z_-]+", key) and not name.startswith("//"):
            raise RecipeError(f"{self.path}: there is no data source {key!r}. {did_you_mean(key, source)}")
        return source["hub"], self.path

    def inputs(self) -> Iterator[str]:
        """Yield the files and folders that are read, whose content is part of a run's identity."""
        if self.path.startswith("stage:"):
            yield self.path  # the pipeline knows the stage, and puts the file that it made in its place
            return
        entry, name = self.source
        yield from entry.facts.inputs(self, name)
