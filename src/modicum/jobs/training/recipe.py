"""What a recipe of the train job may say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from modicum import registry
from modicum.errors import RecipeError
from modicum.jobs.data.rows import DataSection
from modicum.recipe import Recipe, Section, choice
from modicum.types import PositiveInt

# What the run itself decides; each has another place in the recipe or none.
OWNED = {
    "output_dir": "use --out",
    "seed": "use the recipe's own seed",
    "data_seed": "use the recipe's own seed",
    "resume_from_checkpoint": "run the same command again: it resumes by itself",
    "push_to_hub": "push the finished folder yourself",
}


class ModelSection(Section):
    """The model to start from."""

    path: str = Field(description="local folder, Hub id, or builtin:smollm2-135m-instruct")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attention: str | None = Field(default=None, description="such as sdpa or eager")
    scratch: dict[str, Any] | None = Field(
        default=None, description="start from random weights; fields of config.json that are to differ, or {}"
    )
    convert: choice(registry.model) | None = Field(  # type: ignore[valid-type]
        default=None, description="turn it into another architecture first, such as zero_token"
    )
    allow_pickle: bool = False
    remote_code: bool = False


class AdapterSection(Section):
    """A LoRA adapter; what stands under ``config`` goes to ``peft.LoraConfig`` verbatim."""

    rank: PositiveInt = 8
    init: choice(registry.adapter_init) | None = None  # type: ignore[valid-type]
    config: dict[str, Any] = Field(default_factory=dict, description="further fields of peft.LoraConfig")
    compare: str | None = Field(
        default=None, description="a full fine-tune of the same base, to whose change the report measures the angles"
    )


class TrainRecipe(Recipe):
    """What to train, on what, and how."""

    job: Literal["train"] = "train"
    model: ModelSection
    data: DataSection
    eval_data: DataSection | None = None
    adapter: AdapterSection | None = Field(default=None, description="train a LoRA adapter instead of all weights")
    objective: choice(registry.objective) | None = None  # type: ignore[valid-type]
    gradient: choice(registry.gradient_rule) | None = None  # type: ignore[valid-type]
    optimizer: choice(registry.zeroth_order) | None = Field(default=None, description="a zeroth-order optimiser")  # type: ignore[valid-type]
    trainer: dict[str, Any] = Field(default_factory=dict, description="fields of transformers.TrainingArguments")

    @field_validator("model", "data", "eval_data", mode="before")
    @classmethod
    def _path_alone(cls, value: object) -> object:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("trainer")
    @classmethod
    def _leave_to_the_run(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in OWNED.keys() & value.keys():
            raise ValueError(f"trainer.{key} is set by the run: {OWNED[key]}")
        return value

    @model_validator(mode="after")
    def _parts_fit(self) -> TrainRecipe:
        if self.optimizer is not None and self.gradient is not None:
            raise RecipeError("optimizer is zeroth-order: it has no gradients for `gradient` to act on. Drop one.")
        if self.adapter is not None and self.model.scratch is not None:
            raise RecipeError("adapter and model.scratch came together: random weights are no base. Drop one.")
        init = self.adapter.init if self.adapter else None
        if init is not None and init.knobs.get("reuse_data") == "continue":
            raise RecipeError(
                "adapter.init.reuse_data: continue is for loops of your own; the trainer draws its rows anew."
            )
        if self.adapter is not None and self.adapter.compare is not None:
            if init is None:
                raise RecipeError("adapter.compare needs a start that is known. Set adapter.init, such as `default`.")
            if self.model.convert is not None:
                raise RecipeError("adapter.compare and model.convert came together: their weights differ. Drop one.")
        return self

    def inputs(self) -> Iterator[str]:
        """Yield the models and the data."""
        yield self.model.path
        if self.adapter is not None and self.adapter.compare is not None:
            yield self.adapter.compare
        for data in (self.data, self.eval_data):
            if data is not None:
                yield from data.inputs()
