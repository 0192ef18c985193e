"""What data is for the jobs: the section of a recipe that names it, and rows of one of three kinds.

==============  ====================================================
``text``        ``{"text": str}``
``chat``        ``{"messages": [{"role": …, "content": …}, …]}``
``completion``  ``{"prompt": str, "completion": str}``
==============  ====================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import Field, field_validator

from modicum.recipe import Section
from modicum.types import NonNegativeInt, PositiveInt

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
