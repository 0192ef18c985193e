"""Turn the model into another architecture before it is trained, and train the modules that were added."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from modicum.jobs.training.recipe import TrainRecipe


@training_part("conversion", order=0)
class Conversion(Part):
    """Convert the model by a method of ``modicum list models``: the recipe's ``model.convert``."""

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether the recipe has ``model.convert``."""
        return recipe.model.convert is not None

    def model(self, model: Any, _tokenizer: Any) -> Any:
        """Return the converted model."""
        from modicum.jobs.loading.models import fresh_model

        section = self.recipe.model
        method: Any = section.convert
        converted = registry.model[method.name].function(model, **method.knobs)
        if section.scratch is None:
            return converted
        # A converted shape draws its own weights: one with more visits may want smaller ones.
        return fresh_model(
            converted.config,
            seed=self.recipe.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            attention=section.attention,
            remote_code=section.remote_code,
        )


@training_part("model_step", order=5)
class ModelStep(Part):
    """Tell a model that goes by the step of training which step it is."""

    def trainer(self, build: Build) -> None:
        """Add the callback; a model that was converted in an earlier run needs it too."""
        from transformers import TrainerCallback

        class StepCallback(TrainerCallback):
            def on_step_begin(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
                if hasattr(model, "set_training_step"):
                    model.set_training_step(state.global_step, state.max_steps)

        build.add_callback(StepCallback())


@training_part("extra_modules")
class ExtraModules(Part):
    """Put the modules that a conversion added into the adapter; the Trainer spares them weight decay."""

    def adapter(self, fields: dict[str, Any], model: Any) -> dict[str, Any]:
        """Return the fields of ``LoraConfig`` with these modules in ``modules_to_save``."""
        from modicum.jobs.training.extra_modules import additions

        added = additions(model)
        saved = sorted({*(fields.get("modules_to_save") or ()), *added})
        return fields | {"modules_to_save": saved} if added else fields
