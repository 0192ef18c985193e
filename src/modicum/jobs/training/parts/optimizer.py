"""Train by forward passes alone: the recipe's ``optimizer``."""

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

    from modicum.jobs.training.batches import Batches
    from modicum.jobs.training.trainer import PartsTrainer
    from modicum.optim.zeroth_order.step import ZerothOrder


@training_part("optimizer", section=choice(registry.zeroth_order), description="a zeroth-order optimiser", order=40)
class Optimizer(Part):
    """Train by a method of ``modicum list zeroth_order`` in place of the backward pass."""

    section: Choice
    keeps_dtype = True
    brings = ("optimizer", "training step")
    optimizer: ZerothOrder

    def fit(self, parts: Sequence[Part]) -> None:
        """Refuse parts that work on gradients."""
        for part in parts:
            if part.needs_gradients is not None:
                raise RecipeError(
                    f"optimizer is zeroth-order: it has no gradients for `{part.needs_gradients}` to act on. Drop one."
                )

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse arguments without effect, knobs that exclude each other, and losses that no engine computes."""
        from modicum.jobs.training.zeroth_order import PAIRED, check_knobs
        from modicum.jobs.training.zeroth_order_arguments import check_arguments

        check_arguments(arguments, given=self.recipe.trainer)
        check_knobs(self.section.name, self.section.knobs)
        objective: Choice | None = self.recipe.section("objective")
        gathered = objective is not None and registry.objective[objective.name].facts.loss_head
        if self.section.knobs.get("engine") == "paired" and (gathered or arguments.label_smoothing_factor):
            raise UnsupportedError(PAIRED)

    def foresee(self, _note: Callable[[str], None], model: Any, _tokenizer: Any) -> None:
        """Refuse names of which the model has none; an adapter's are known once it is there."""
        from modicum.jobs.training.zeroth_order import check_selection

        if model is not None and self.recipe.section("adapter") is None and self.recipe.model.convert is None:
            check_selection(self.section.name, self.section.knobs, model)

    def start(self, model: Any, _batches: Batches) -> None:
        """Attach the optimiser to the model, before other parts put their hooks there."""
        from modicum.jobs.training.zeroth_order import attach_optimizer

        self.optimizer = attach_optimizer(
            self.section.name, self.section.knobs, model, seed=self.recipe.seed, note=self.run.note
        )

    def trainer(self, build: Build) -> None:
        """Replace optimiser and training step."""
        from modicum.jobs.training.zeroth_order import ZerothOrderStep, zeroth_order_callback

        build.optimizer, build.own_step = self.optimizer, ZerothOrderStep(self.optimizer)
        build.add_callback(zeroth_order_callback(self.optimizer))

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Return the costs of the steps."""
        kept = sum(p.nbytes for p in trainer.model.parameters())
        return {"zeroth_order": {"model_bytes": kept, **self.optimizer.report()}}
