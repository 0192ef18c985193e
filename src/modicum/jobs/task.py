"""Tasks of the evaluate job: a measure, the data that it reads, and its knobs.

A recipe's ``tasks: {name: {kind: MEASURE, data: …, knob: value}}`` is checked against the signatures of the measure's
functions; see :class:`modicum.facts.MeasureFacts`.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from modicum.borders import expanded, loads
from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.rows import Rows
from modicum.facts import MeasureFacts
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.jobs.loading.models import load_tokenizer
from modicum.recipe import Section
from modicum.registry import Entry, measure, row_kind, wanted


class Task(Section):
    """A measure by its name, the data that it reads, and its knobs."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(description="the measure, by its name")
    data: DataSection = Field(description="rows of the task, as a section or a path")

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        if isinstance(value, Task):
            return value
        if not isinstance(value, Mapping) or not isinstance(value.get("kind"), str):
            raise ValueError(f"'kind' is missing. Set it to one of: {', '.join(measure)}")
        entry = measure[value["kind"]]
        data = value.get("data", entry.facts.data)
        knobs = entry.knobs({key: item for key, item in value.items() if key not in ("kind", "data")})
        return {"kind": entry.name, **({} if data is None else {"data": data}), **knobs}

    @model_validator(mode="after")
    def _fits(self) -> Task:
        self.ask(self.measure.facts.check)
        return self

    @property
    def measure(self) -> Entry[MeasureFacts]:
        """The measure, with its facts."""
        return measure[self.kind]

    @property
    def metric(self) -> str:
        """Name of the measured quantity."""
        return str(self.knobs.get("metric") or self.measure.facts.metric or self.kind)

    @property
    def knobs(self) -> dict[str, Any]:
        """The measure's knobs, checked and completed."""
        return dict(self.model_extra or {})

    def ask(self, function: Callable[..., Any] | None, *data: Any, **supplied: Any) -> Any:
        """Call one of the measure's functions with the keywords that its signature names.

        Beside knobs these are ``max_length`` and ``data_path`` of the data, ``tokens_of(model)`` to count tokens,
        ``read_lines(file)`` to read lines of JSON, and what the job supplies: the confidence ``level``, the ``seed``,
        ``reference_of(model)`` to ask another model the same, and ``judge_of(judge)`` for a judge and what is known of
        its errors.

        Args:
            function: The measure itself, or a function among its facts; ``None`` gives ``None``.
            data: Positional arguments.
            supplied: Keywords that only the caller knows.
        """
        if function is None:
            return None
        offered: dict[str, Any] = {"max_length": self.data.max_length, "data_path": self.data.path}
        offered |= {"tokens_of": _tokens_of, "read_lines": _read_lines}
        return function(*data, **wanted(function, {**offered, "metric": self.metric, **self.knobs, **supplied}))

    def inputs(self) -> Iterator[str]:
        """Yield the files that the data and the knobs name, and those that these name in turn."""
        yield from self.data.inputs()
        yield from (str(self.knobs[name]) for name in self.measure.facts.reads if self.knobs[name] is not None)
        yield from self.ask(self.measure.facts.brings) or ()
        if "judge" in self.knobs:
            from modicum.jobs.chat.targets import any_judge

            yield from any_judge(self.knobs["judge"]).inputs()

    def rows(self, seed: int, note: Callable[[str], None] | None = None) -> Rows:
        """Read the data, and prepare it as the measure needs.

        Args:
            seed: The recipe's.
            note: Told when bad rows were left out.

        Raises:
            RecipeError: The data holds rows of another kind than the measure needs.
        """
        facts = self.measure.facts
        load = partial(self._load, seed, note)
        if facts.prepare is None:
            return load()
        made: Rows = self.ask(facts.prepare, load, seed=seed)
        return made

    def _load(self, seed: int, note: Callable[[str], None] | None) -> Rows:
        expected = self.measure.facts.rows
        rows = load_rows(self.data, seed=seed, note=note, prefer=expected)
        if rows.kind != expected:
            fields = " and ".join(row_kind[expected].facts.fields)
            raise RecipeError(f"{self.data.path} holds {rows.kind} rows; a task of kind {self.kind} needs {fields}.")
        return rows


def _tokens_of(reference: str) -> Callable[[str], int]:
    tokenizer = load_tokenizer(reference)
    return lambda text: len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _read_lines(name: str) -> Iterator[dict[str, Any]]:
    path, number = expanded(name), 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    yield loads(line)
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror or error}.") from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}, line {number}: not valid JSON ({error.msg}).") from None
