"""Change the inputs, labels or hidden states of training batches: the recipe's ``objective``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Part
from modicum.recipe import Choice, choice
from modicum.registry import training_part

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import PartsTrainer


@training_part(
    "objective",
    section=choice(registry.objective),
    description="what is learned in place of plain next tokens, such as meap or dpo",
    order=20,
)
class Objective(Part):
    """Apply a method of ``modicum list objectives`` to training batches; one that judges answers has its own part."""

    section: Choice
    mask: int | None = None

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether the objective acts on batches or inside the model."""
        acts_on = registry.objective[recipe.section("objective").name].facts.acts_on
        return acts_on in ("input_ids", "inputs_embeds", "hidden_states")

    def __init__(self, name: str, recipe: TrainRecipe, section: Choice) -> None:
        super().__init__(name, recipe, section)
        if registry.objective[section.name].facts.loss_head:
            self.brings = ("loss",)

    def fit(self, parts: Sequence[Part]) -> None:
        """Refuse a training step that evaluates the model as it is used, where the objective would do nothing."""
        inside = registry.objective[self.section.name].facts.acts_on != "input_ids"
        for part in parts:
            if inside and "training step" in part.brings:
                raise RecipeError(
                    f"objective: {self.section.name} acts inside a model that is in training mode, and `{part.name}` "
                    "evaluates the model as it is used, so it would change nothing. Drop one."
                )

    def check(self, _arguments: TrainingArguments) -> None:
        """Refuse packed rows where the objective copies whole ones."""
        if self.recipe.data.packing and registry.objective[self.section.name].facts.whole_rows:
            raise UnsupportedError(
                f"{self.section.name} copies whole rows, and data.packing puts several documents into one. Set "
                "data.packing: false, or expand the data set with expand_sft before it is packed."
            )

    def foresee(self, _note: Callable[[str], None], model: Any, tokenizer: Any) -> None:
        """Refuse a mask token that the model has no row for, or one that means something else."""
        from modicum.jobs.training.objective import complete_knobs

        knobs = registry.objective[self.section.name].knobs(self.section.knobs)
        if model is not None and knobs.get("mask_token_id") is not None:  # else one is found, or added
            complete_knobs(self.section.name, self.section.knobs, tokenizer=tokenizer, model=model)

    def model(self, model: Any, tokenizer: Any) -> Any:
        """Give the model a mask token where the objective needs one, before an adapter surrounds the embedding."""
        from modicum.jobs.training.objective import complete_knobs

        self.rows = model.get_input_embeddings().weight.shape[0]
        knobs = complete_knobs(self.section.name, self.section.knobs, tokenizer=tokenizer, model=model)
        self.mask = knobs.get("mask_token_id")
        return model

    def adapter(self, fields: dict[str, Any], _model: Any) -> dict[str, Any]:
        """Make the mask token's row trainable."""
        from modicum.jobs.training.objective import lora_options

        return lora_options({"mask_token_id": self.mask}) | fields

    def trainer(self, build: Build) -> None:
        """Wrap the collator, and add callback, loss and hooks of the objective."""
        from modicum.jobs.training.objective import use_objective

        use_objective(build, self.section.name, seed=self.recipe.seed, **self.section.knobs)

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Take the mask token out again."""
        from modicum.jobs.training.objective import finish_model

        if self.mask is not None:
            self.own_tokens = (self.mask,)
            finish_model(trainer.model, mask_token_id=self.mask, rows=self.rows)
        return {}
