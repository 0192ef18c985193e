"""The section of a recipe that names data: where rows come from, and how they become prompts and labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import ConfigDict, Field, field_validator, model_validator

from modicum.borders import expanded
from modicum.errors import RecipeError, did_you_mean
from modicum.job_facts import SourceFacts
from modicum.recipe import Section
from modicum.registry import Entry, row_kind, source
from modicum.types import NonNegative, NonNegativeInt, PositiveInt

LONGEST = 100_000  # characters of what stands in every row; a million of {prompt} would make gigabytes of text
MIXED = "mix:"  # how the path of a mixture begins, which holds the names of its parts


class Fields(Section):
    """Names of the fields in the user's files; a kind of rows with further fields has them here too."""

    model_config = ConfigDict(extra="allow")

    text: str = Field(default="text", description="field of a plain text")
    messages: str = Field(default="messages", description="field of a chat's list of messages")
    prompt: str = Field(default="prompt", description="field of what is asked")
    completion: str = Field(default="completion", description="field of what is to be answered")

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


class ScorerSection(Section):
    """Who scores answers: one of file, function, model and heads_of."""

    file: str | None = Field(default=None, description="lines of JSON with prompt, answer and scores")
    function: str | None = Field(
        default=None, description="FILE.py:NAME of a function (prompt, answer) -> scores; its code is run"
    )
    model: str | None = Field(default=None, description="a local model that classifies sequences; a head per output")
    heads_of: str | None = Field(
        default=None, description="a language model on whose hidden states a linear head is trained for each part"
    )
    share: Annotated[float, Gt(0), Lt(1)] = Field(
        default=1 / 3, description="prompts on which heads are trained; their pairs are left out of the mixture"
    )
    l2: Annotated[float, Gt(0)] = Field(default=1.0, description="penalty of trained heads")
    batch_size: PositiveInt = Field(default=8, description="rows at a time of a model that scores")
    max_length: PositiveInt = Field(default=1024, description="tokens of prompt and answer; a longer one is refused")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        return {"function" if re.search(r"\.py:\w+$", value) else "file": value}

    @model_validator(mode="after")
    def _is_one(self) -> ScorerSection:
        given = [name for name in ("file", "function", "model", "heads_of") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"got {' and '.join(given) or 'none'}, expected one of file, function, model and heads_of")
        if self.function is not None and not re.fullmatch(r".+:[A-Za-z_]\w*", self.function):
            raise ValueError(f"function is {self.function!r}, expected FILE.py:NAME or MODULE:NAME")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the file, the code or the model that decides the scores."""
        yield from (name for name in (self.file, self.model, self.heads_of) if name is not None)
        if self.function is not None:
            place = self.function.rpartition(":")[0]
            yield from [place] if place.endswith(".py") else _code_of(place)


def _code_of(module: str) -> Iterator[str]:
    """Yield what tells versions of a module apart: that of the package that brings it, else its files."""
    top = module.partition(".")[0]
    if distributions := packages_distributions().get(top):
        yield from (f"{name}=={version(name)}" for name in distributions)
        return
    try:
        spec = find_spec(top)  # a package inside another one would be imported
    except (ImportError, ValueError):
        return  # whoever imports it says why it cannot
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        yield from map(str, sorted(Path(folder).rglob("*.py")))
    if spec is not None and not spec.submodule_search_locations:
        yield spec.origin or top


class Filter(Section):
    """Which pairs of a mixture are kept, by what a scorer gives the chosen answer more."""

    scorer: ScorerSection = Field(description="who scores the answers; a name alone is a file or a function")
    rank: Literal["agree", "min", "mean", "gated"] = Field(
        default="agree", description="all heads prefer the chosen answer; or the order in which pairs are kept"
    )
    keep: Annotated[float, Gt(0), Le(1)] = Field(default=1.0, description="share of the pairs in this order")
    heads: PositiveInt | list[str] | None = Field(default=None, description="how many heads count, or their names")
    weights: list[NonNegative] | None = Field(
        default=None, description="weights of the heads, for rank: gated; a scorer may give its own for each prompt"
    )


class Rounds(Section):
    """Rounds of training, after each of which the weights of the parts follow validation."""

    count: Annotated[int, Ge(2)] = Field(default=4, description="how many rounds")
    eta: NonNegative = Field(default=1.0, description="how fast weights follow")


class Mix(Section):
    """Parts of a mixture of data, one for each dimension."""

    parts: dict[str, DataSection] = Field(min_length=1, description="name: the data of a part, as a section or a path")
    ratios: list[float] | dict[str, float] | None = Field(
        default=None, description="shares of the parts, in their order or by name; equal when not given"
    )
    repeat: bool = Field(default=False, description="a part with too few rows is drawn from again")
    filter: Filter | None = Field(default=None, description="keep only pairs whose chosen answer scores higher")
    rounds: Rounds | None = Field(default=None, description="train in rounds, and let the shares follow validation")

    @model_validator(mode="before")
    @classmethod
    def _parts_alone(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and "parts" not in value and not {*value} <= {*cls.model_fields}:
            known = {key: item for key, item in value.items() if key in cls.model_fields}
            value = {**known, "parts": {key: item for key, item in value.items() if key not in known}}
        return value

    @model_validator(mode="after")
    def _fits(self) -> Mix:
        from modicum.objectives.mixing import distinct_names, split_by_ratio

        try:
            distinct_names([*self.parts])
            if isinstance(self.ratios, list) and len(self.ratios) != len(self.parts):
                raise RecipeError(f"{len(self.ratios)} ratios for {len(self.parts)} parts, expected one for each")
            if isinstance(self.ratios, dict) and {*self.ratios} != {*self.parts}:
                raise RecipeError(f"ratios are of {', '.join(self.ratios)}, expected {', '.join(self.parts)}")
            split_by_ratio(1, self.shares)
        except RecipeError as error:
            raise ValueError(str(error)) from None
        if nested := [name for name, part in self.parts.items() if part.mix is not None]:
            raise ValueError(f"part {nested[0]!r} is a mixture itself. Name its parts here")
        return self

    @property
    def shares(self) -> list[float]:
        """The ratios, in the order of the parts."""
        if isinstance(self.ratios, dict):
            return [self.ratios[name] for name in self.parts]
        return self.ratios or [1.0] * len(self.parts)

    def part(self, name: str, section: DataSection) -> DataSection:
        """Return a part, with what the section says for all parts that do not say it themselves."""
        part = self.parts[name]
        shared = {"split", "seed", "system", "template", "max_length", "long_rows", "on_bad_row", "fields", "shuffle"}
        given = {key: getattr(section, key) for key in shared if key not in part.model_fields_set}
        return part.model_copy(update=given)

    def inputs(self, section: DataSection) -> Iterator[str]:
        """Yield what the parts and the scorer read."""
        for name in self.parts:
            yield from self.part(name, section).inputs()
        if self.filter is not None:
            yield from self.filter.scorer.inputs()


class DataSection(Section):
    """Where rows come from, and how they become prompts and labels."""

    alone: ClassVar[str | None] = "path"
    path: str = Field(
        description="file (jsonl, json, parquet, txt), folder, Hub id, reasoning-gym:TASK, task:NAME or builtin:NAME"
    )
    mix: Mix | None = Field(
        default=None, description="several sections in place of a path: {NAME: section, …}, ratios, filter, rounds"
    )
    split: str = Field(default="train", description="which split of a data set is read, where it has some")
    size: PositiveInt | None = Field(default=None, description="rows to generate, or at most to read")
    shuffle: bool = Field(default=False, description="shuffle before the first `size` rows are taken")
    seed: NonNegativeInt | None = Field(default=None, description="the recipe's seed when not given")
    config: dict[str, Any] = Field(
        default_factory=dict, description="knobs of a reasoning-gym task or a task, or arguments of load_dataset"
    )
    format: str = Field(default="auto", description="kind of the rows; auto: as their fields tell")
    fields: Fields = Field(default=Fields(), description="names of fields in your files, where they differ from these")
    system: str | None = Field(
        default=None, max_length=LONGEST, description="system message put before every prompt or chat"
    )
    template: str = Field(default="{prompt}", max_length=LONGEST, description="text around every prompt")
    max_length: PositiveInt = Field(default=1024, description="tokens of a row; longer ones are cut, or dropped")
    long_rows: Literal["cut", "drop"] = Field(
        default="cut",
        description="drop: rows longer than max_length are left out and counted, so that no answer is cut",
    )
    packing: bool = Field(default=False, description="fill rows up to max_length with several samples")
    completion_only: bool = Field(default=True, description="learn from the assistant's words only")
    on_bad_row: Literal["stop", "skip"] = Field(
        default="stop", description="a row that cannot be read or learned from ends the run, or is left out and counted"
    )

    @model_validator(mode="before")
    @classmethod
    def _mix_has_a_path(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and isinstance(value.get("mix"), Mapping) and "path" not in value:
            parts = value["mix"].get("parts", value["mix"])
            names = parts if isinstance(parts, Mapping) else ()
            return {**value, "path": f"{MIXED}{'+'.join(str(n) for n in names if n not in Mix.model_fields)}"}
        return value

    @model_validator(mode="after")
    def _path_or_mix(self) -> DataSection:
        named = None if self.mix is None else f"{MIXED}{'+'.join(self.mix.parts)}"
        if self.path.startswith(MIXED) is (named is None) or (named is not None and self.path != named):
            raise ValueError(f"path is {self.path!r}, expected a path or a mix, and not both")
        return self

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
        if self.mix is not None:
            return source["mix"], ""
        key, colon, name = self.path.partition(":")
        if colon and key in source:
            return source[key], name
        if expanded(self.path).exists():
            return source["file"], self.path
        if colon and re.fullmatch(r"[a-z][a-z_-]+", key) and not name.startswith("//"):
            raise RecipeError(f"{self.path}: there is no data source {key!r}. {did_you_mean(key, source)}")
        return source["hub"], self.path

    def unscored(self, note: Callable[[str], object]) -> DataSection:
        """Return the section without a filter for which a model would have to read every answer, and say so."""
        if self.mix is None or self.mix.filter is None:
            return self
        scorer = self.mix.filter.scorer
        if scorer.model is None and scorer.heads_of is None:
            return self
        note("mix: how many pairs the filter keeps is known once its model has scored them.")
        # However few it keeps: the run says so then.
        return self.model_copy(update={"mix": self.mix.model_copy(update={"filter": None})})

    def inputs(self) -> Iterator[str]:
        """Yield the files and folders that are read, whose content is part of a run's identity."""
        if self.path.startswith("stage:"):
            yield self.path  # the pipeline knows the stage, and puts the file that it made in its place
            return
        entry, name = self.source
        yield from entry.facts.inputs(self, name)
