"""Learn from whole answers: the recipe's ``objective`` where it judges answers rather than tokens."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.errors import UnsupportedError
from modicum.jobs.training.parts import Build, Data, Part
from modicum.recipe import Choice
from modicum.registry import training_part

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import PartsTrainer


@training_part("answers", order=20)
class Answers(Part):
    """Ask the model each row's question and judge its answer, in training and evaluation."""

    brings = ("loss",)

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether the objective is one over answers."""
        chosen: Choice | None = recipe.section("objective")
        return chosen is not None and registry.objective[chosen.name].facts.acts_on == "answers"

    def __init__(self, name: str, recipe: TrainRecipe, _section: None = None) -> None:
        super().__init__(name, recipe, recipe.section("objective"))

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse an optimiser that cannot learn from these answers, and evaluations in another form."""
        if arguments.batch_eval_metrics or not arguments.eval_do_concat_batches:
            raise UnsupportedError(
                f"{self.section.name} takes the scores of an evaluation as one list. Leave out "
                "trainer.batch_eval_metrics and trainer.eval_do_concat_batches."
            )
        optimizer: Choice | None = self.recipe.section("optimizer")
        facts = registry.objective[self.section.name].facts
        if not facts.differentiable and optimizer is None:
            raise UnsupportedError(
                f"{self.section.name} has no gradient. Use a zeroth-order optimizer, such as optimizer: tezo."
            )
        engine = optimizer.knobs.get("engine") if optimizer is not None else None
        if facts.answers == "generated" and engine in ("paired", "jvp"):
            raise UnsupportedError(
                f"{self.section.name} generates its answers, which engine={engine!r} cannot. Use 'adapter'."
            )

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Have an evaluation collect the scores of the rows, and not the loss alone."""
        return {"prediction_loss_only": False} | fields

    def data(self, data: Data) -> Data:
        """Ask the rows as questions."""
        from modicum.jobs.training.answers import answer_rows, check_rows

        check_rows(data.rows, data.section, self.section.name)
        options = {"name": self.section.name, "knobs": self.section.knobs, "training": data.training}
        return replace(data, encode=partial(answer_rows, **options))

    def trainer(self, build: Build) -> None:
        """Replace collator and loss, and measure the answers."""
        from modicum.jobs.training.answers import use_answers

        use_answers(build, self.section.name, self.section.knobs)

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Measure the trained model where there is evaluation data."""
        if self.recipe.eval_data is None:
            return {}
        from modicum.jobs.training.answers import measured

        return measured(trainer.evaluate(), self.section.name)
