"""Clip gradients by a rule: the recipe's ``gradient``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.jobs.training.parts import Build, Part
from modicum.recipe import Choice, choice
from modicum.registry import training_part

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments


@training_part(
    "gradient",
    section=choice(registry.gradient_rule),
    description="what is done to gradients before each step, such as clipping",
    order=30,
)
class Gradient(Part):
    """Apply a method of ``modicum list gradient_rules`` at every optimiser step."""

    section: Choice
    needs_gradients = "gradient"

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Turn the Trainer's own clipping off."""
        return {"max_grad_norm": 0.0} | fields

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse a Trainer that clips too, and states that a checkpoint cannot hold."""
        from modicum.jobs.training.gradient import check_arguments

        self._callback()
        check_arguments(arguments, self.section.name, self.section.knobs)

    def trainer(self, build: Build) -> None:
        """Add the rule as a callback."""
        build.add_callback(self._callback(folder=self.run.folder, note=self.run.note))

    def _callback(self, **options: Any) -> TrainerCallback:
        from modicum.jobs.training.gradient import gradient_callback

        return gradient_callback(self.section.name, self.section.knobs, **options)
