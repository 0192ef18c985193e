"""The schema of a train recipe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, create_model, field_validator, model_validator

from modicum import registry
from modicum.borders import is_file
from modicum.jobs.data.rows import DataSection
from modicum.jobs.training.parts import check_fit, in_order, parts_of
from modicum.recipe import Recipe, Section, choice

# Arguments that the run itself sets; each has another place in the recipe or none.
OWNED = {
    "output_dir": "use --out",
    "seed": "use the recipe's own seed",
    "data_seed": "use the recipe's own seed",
    "resume_from_checkpoint": "run the same command again: it resumes by itself",
    "push_to_hub": "push the finished folder yourself",
}


class ModelSection(Section):
    """The model to start from."""

    alone: ClassVar[str | None] = "path"
    path: str = Field(description="local folder, Hub id, or builtin:smollm2-135m-instruct")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="of the weights in training; auto: as they are stored"
    )
    attention: str | None = Field(default=None, description="such as sdpa or eager")
    scratch: dict[str, Any] | None = Field(
        default=None, description="start from random weights; fields of config.json that are to differ, or {}"
    )
    convert: choice(registry.model) | None = Field(  # type: ignore[valid-type]
        default=None, description="turn it into another architecture first, such as zero_token"
    )
    allow_pickle: bool = False
    remote_code: bool = False

    @field_validator("convert")
    @classmethod
    def _is_made_of_one_model(cls, value: Any) -> Any:
        if value is not None and registry.model[value.name].facts.several:
            raise ValueError(f"a {value.name} model is made of several trained ones. Train these, then use job: route")
        return value


class TrainRecipe(Recipe):
    """The model to train, its data, and the mechanisms of training.

    Every training part with a section adds a key of its name; see :mod:`modicum.jobs.training.parts`.
    """

    job: Literal["train"] = "train"
    model: ModelSection = Field(description="the model to start from, as a section or a path")
    data: DataSection = Field(description="what is trained on, as a section or a path")
    eval_data: DataSection | None = Field(default=None, description="what is evaluated on, as a section or a path")
    if TYPE_CHECKING:  # added below, after the keys of the parts
        trainer: dict[str, Any]

    @field_validator("trainer", check_fields=False)
    @classmethod
    def _leave_to_the_run(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in OWNED.keys() & value.keys():
            raise ValueError(f"trainer.{key} is set by the run: {OWNED[key]}")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainRecipe:
        check_fit(self, parts_of(self))
        return self

    def section(self, part: str) -> Any:
        """Return the value of a training part's key; ``None`` where the recipe does not have the key."""
        return getattr(self, part, None)

    def inputs(self) -> Iterator[str]:
        """Yield the models, the data, and the files that the trainer's arguments name."""
        yield self.model.path
        for value in self.trainer.values():
            if isinstance(value, str) and is_file(value):
                yield value
        for part in parts_of(self):
            yield from part.inputs()
        for data in (self.data, self.eval_data):
            if data is not None:
                yield from data.inputs()


def _with_parts(base: type[TrainRecipe]) -> type[TrainRecipe]:
    """Return the schema with the keys of the training parts, in their order, before ``trainer``."""
    keys: dict[str, Any] = {
        entry.name: (entry.facts.section | None, Field(default=None, description=entry.facts.description))
        for entry in in_order()
        if entry.facts.section is not None
    }
    if taken := keys.keys() & {"trainer", *base.model_fields}:
        raise TypeError(f"The recipe has a key {min(taken)!r} already. Give the training part another name.")
    keys["trainer"] = (
        dict[str, Any],
        Field(default_factory=dict, description="fields of transformers.TrainingArguments"),
    )
    return create_model(base.__name__, __base__=base, __doc__=base.__doc__, __module__=base.__module__, **keys)


if not TYPE_CHECKING:  # mypy knows the keys that every recipe has; parts read their own from `section`
    TrainRecipe = _with_parts(TrainRecipe)
