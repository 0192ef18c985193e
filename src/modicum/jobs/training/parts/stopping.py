"""End a run that diverged or did nothing with an error, and one that gets no better: the recipe's ``stop_on``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modicum.errors import RecipeError, TrainingError
from modicum.jobs.training.parts import Build, Part
from modicum.recipe import Section
from modicum.registry import training_part
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.jobs.training.trainer import PartsTrainer
    from modicum.jobs.training.watch import LossWatch


class StopSection(Section):
    """When to end a run before its last step."""

    nan: bool = Field(default=False, description="end with an error at the first loss that is NaN or infinite")
    patience: PositiveInt | None = Field(
        default=None, description="evaluations in a row without a better value after which the run is done"
    )


@training_part("divergence", order=-20)
class Divergence(Part):
    """Refuse to save or to finish a model whose trained weights are not finite, or that no step has trained.

    It sees every loss, and so it also tells their mean, whose sums a resumed run goes on with.
    """

    watch: LossWatch

    def trainer(self, build: Build) -> None:
        """Watch the losses, and the weights before each checkpoint and wherever a loss is not finite."""
        from transformers import TrainerCallback

        from modicum.jobs.training.watch import EVERY, LossWatch

        part, self.watch = self, LossWatch()
        stop: StopSection | None = self.recipe.section("stop_on")
        at_once = stop is not None and stop.nan

        class DivergenceCallback(TrainerCallback):
            def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
                part.watch.step = state.global_step + 1

            def on_step_end(self, _args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                due = at_once or control.should_log or control.should_save or state.global_step % EVERY == 0
                bad = due and part.watch.look()
                if bad and at_once:
                    part.refuse(f"Step {part.watch.first}: the loss is NaN or infinite, and stop_on.nan is true.")
                if bad or control.should_save:
                    part.check_weights(model, state.global_step)

            def on_epoch_end(self, _args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
                if control.should_save:
                    part.check_weights(model, state.global_step)

            def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, float], **_: Any) -> None:
                # The Trainer forgets the losses before a checkpoint when it goes on from it. One that is not finite it
                # replaces by the mean of those before, or, without that filter, writes NaN to the end of the run.
                if "loss" in logs:
                    mean = part.watch.since_logged(state.global_step)
                    logs["loss"] = state.log_history[-1]["loss"] = mean if math.isfinite(mean) else math.nan

        build.watchers.append(self.watch)
        build.add_callback(DivergenceCallback())

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Refuse a model that diverged, and one that is as it was."""
        step = trainer.state.global_step
        if not step:
            raise TrainingError(
                "The run did no optimiser step: nothing was trained. Check the size of the data, "
                "trainer.num_train_epochs, trainer.max_steps and trainer.dataloader_drop_last."
            )
        self.watch.look()
        self.check_weights(trainer.model, step)
        if self.watch.last_is_bad:
            self.refuse(f"Step {step}, the last one: the loss is NaN or infinite, since step {self.watch.first}.")
        if self.watch.count:
            self.run.note(
                f"{self.watch.count} losses were NaN or infinite, the first at step {self.watch.first}; the weights "
                "are finite. stop_on: {nan: true} ends a run at the first."
            )
        return {"train_loss": self.watch.mean(step)}

    def remember(self) -> dict[str, Tensor]:
        """Return what is known of the losses."""
        return self.watch.state()

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the losses of the run before."""
        if state:
            self.watch.load(state)
        else:
            self.run.note("The checkpoint is of an earlier version: train_loss is the mean of the steps after it.")

    def check_weights(self, model: Any, step: int) -> None:
        """Refuse trained weights that are not finite."""
        from modicum.jobs.training.watch import infinite_weights

        if name := next(infinite_weights(model), None):
            first = f" The loss is NaN or infinite since step {self.watch.first}." if self.watch.first else ""
            self.refuse(f"Step {step}: the weight {name} holds NaN or infinite values.{first}")

    def refuse(self, what: str) -> None:
        """Raise an error that says from where to go on, and what to try."""
        from modicum.jobs.training.watch import diverged

        rate = "optimizer.lr" if self.recipe.section("optimizer") is not None else "trainer.learning_rate"
        tips = [f"a lower {rate}", "a longer trainer.warmup_steps"]
        if rate == "trainer.learning_rate" and self.recipe.section("gradient") is None:
            tips.insert(0, "gradient: adagc")
        if self.recipe.trainer.get("fp16") or self.recipe.model.dtype == "float16":
            tips.insert(0, "bfloat16 or float32 in place of float16")
        raise diverged(what, self.run.folder / "checkpoints", ", ".join(tips[:-1]) + f" or {tips[-1]}")


@training_part("stop_on", section=StopSection, description="when to end before the last step", order=55)
class StopOn(Part):
    """End a run whose evaluations get no better; a loss that is not finite is the business of ``divergence``."""

    section: StopSection

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse patience without evaluations."""
        if self.section.patience is not None and arguments.eval_strategy == "no":
            raise RecipeError("stop_on.patience counts evaluations. Set eval_data and trainer.eval_strategy.")

    def trainer(self, build: Build) -> None:
        """Add the callback, which reads the log of the run and so needs no state of its own."""
        from transformers import TrainerCallback

        if self.section.patience is None:
            return
        patience, run = self.section.patience, self.run

        class PatienceCallback(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if self.patient(args, state):
                    return
                control.should_training_stop = True  # the run was killed after its last evaluation

            def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if not self.patient(args, state):
                    control.should_training_stop = True
                    run.note(
                        f"Stopped at step {state.global_step}: {self.metric} got no better in {patience} evaluations."
                    )

            def patient(self, args: Any, state: Any) -> bool:
                metric = args.metric_for_best_model or "loss"
                self.metric = metric = metric if metric.startswith("eval_") else f"eval_{metric}"
                sign = -1 if args.greater_is_better else 1
                values = [sign * line[metric] for line in state.log_history if metric in line]
                values = [value if value == value else float("inf") for value in values]
                return not values or len(values) - 1 - values.index(min(values)) < patience

        build.add_callback(PatienceCallback())
