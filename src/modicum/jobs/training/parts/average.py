"""Averages of the weights on the way: the recipe's ``average``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Part
from modicum.recipe import Section, choice
from modicum.registry import averager, training_part
from modicum.types import Decay, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.jobs.training.averages import Ring
    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import PartsTrainer
    from modicum.weights.moving import MovingAverage


class MovingSection(Section):
    """A moving average of the trained weights."""

    decay: Decay | None = Field(default=0.999, description="what an update multiplies the past by; null for the mean")
    every: PositiveInt = Field(default=1, description="optimiser steps between updates")
    start: NonNegativeInt = Field(default=0, description="the step before the first update")


class RingSection(Section):
    """The latest snapshots of the trained weights, and their mean."""

    keep: PositiveInt = Field(default=10, description="how many")
    every: PositiveInt = Field(description="optimiser steps between snapshots")
    method: choice(averager) = Field(default="uniform", validate_default=True)  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _is_a_rule(self) -> RingSection:
        method: Any = self.method
        if averager[method.name].facts.learns:
            raise ValueError(f"{method.name} learns from data: save checkpoints, and average them by the job average")
        return self


class AverageSection(Section):
    """Averages that are evaluated and saved beside the trained weights."""

    moving: MovingSection | None = Field(default=None, description="a moving average")
    snapshots: RingSection | None = Field(default=None, description="the mean of the latest snapshots")
    window: PositiveInt | None = Field(default=None, description="checkpoints that a later average needs on disk")

    @model_validator(mode="before")
    @classmethod
    def _defaults_alone(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {key: {} if item is None and key == "moving" else item for key, item in value.items()}
        return value

    @model_validator(mode="after")
    def _is_something(self) -> AverageSection:
        if self.moving is None and self.snapshots is None and self.window is None:
            raise ValueError("expected moving, snapshots or window, such as {moving: {decay: 0.999}}")
        return self


@training_part("average", section=AverageSection, description="averages of the weights on the way", order=60)
class Average(Part):
    """Keep averages of the trained weights, evaluate them with every evaluation, and save them beside the model."""

    section: AverageSection
    moving: MovingAverage | None = None
    ring: Ring | None = None

    def __init__(self, name: str, recipe: TrainRecipe, section: AverageSection) -> None:
        super().__init__(name, recipe, section)
        self.before: dict[str, dict[str, Tensor]] = {}  # what a checkpoint holds of them

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse engines that keep the weights to themselves, and checkpoints that would be gone."""
        if arguments.deepspeed:
            raise UnsupportedError(
                "average: DeepSpeed keeps the weights to itself. Use DDP or FSDP2 (fsdp_config: {fsdp_version: 2})."
            )
        config: Mapping[str, Any] = arguments.fsdp_config or {}
        if arguments.fsdp and int(config.get("version", config.get("fsdp_version", 2))) < 2:
            raise UnsupportedError("average: FSDP 1 flattens the weights. Set fsdp_config: {fsdp_version: 2}.")
        if arguments.fsdp and self.recipe.section("adapter") is not None:
            raise UnsupportedError(
                "average: products of sharded factors are not averaged on the way. Save checkpoints, and average them "
                "by the job average; or train the adapter with DDP."
            )
        limit = self.recipe.trainer.get("save_total_limit", 2)
        if self.section.window is not None and limit is not None and 0 < limit < self.section.window:
            raise RecipeError(
                f"average.window is {self.section.window}, but trainer.save_total_limit keeps {limit} checkpoints "
                f"(2 when not given). Set it to {self.section.window} or more."
            )

    def trainer(self, build: Build) -> None:
        """Add the callback that updates and evaluates."""
        from transformers import TrainerCallback

        part = self

        class AverageCallback(TrainerCallback):
            def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
                part.make(model)
                moving, ring = part.section.moving, part.section.snapshots
                step = state.global_step
                if part.moving is not None and moving is not None and step > moving.start and step % moving.every == 0:
                    part.moving.update()
                if part.ring is not None and ring is not None and step % ring.every == 0:
                    part.ring.snapshots.take(step)

            def on_evaluate(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
                from modicum.jobs.training.averages import evaluate

                batches, losses = given.get("eval_dataloader"), {}
                for name, average in part.averages().items():
                    if batches is None:
                        continue
                    with average.in_place():
                        losses[f"eval_loss_{name}"] = evaluate(given["model"], batches, part.loss(build), args.device)
                if losses and state.is_world_process_zero:
                    part.run.log("average", step=state.global_step, **losses)
                    told = " ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
                    part.run.say(f"step {state.global_step} {told}")

        build.add_callback(AverageCallback())

    def loss(self, build: Build) -> Any:
        """Return the loss that evaluations take."""
        if (own := build.own_loss) is not None:
            return lambda model, batch: own(model, batch)[0]
        return lambda model, batch: model(**batch).loss

    def make(self, model: Any) -> None:
        """Make the averages, of the model that the Trainer has prepared; once."""
        from modicum.jobs.training.averages import Ring, lora_factors
        from modicum.weights.moving import MovingAverage

        if self.section.moving is not None and self.moving is None:
            self.moving = MovingAverage(model, decay=self.section.moving.decay, factors=lora_factors(model))
            if state := self.before.get("moving"):
                self.moving.load_state_dict(state)
        if (ring := self.section.snapshots) is not None and self.ring is None:
            method: Any = ring.method
            self.ring = Ring(model, lora_factors(model), keep=ring.keep, method=method.name, knobs=method.knobs)
            if state := self.before.get("ring"):
                self.ring.load_state_dict(state)

    def averages(self) -> dict[str, Any]:
        """Return the averages that have seen something, by name."""
        found: dict[str, Any] = {}
        if self.moving is not None and self.moving.updates:
            found["moving_average"] = self.moving
        if self.ring is not None and len(self.ring.snapshots):
            found["snapshots"] = self.ring
        return found

    def remember(self) -> dict[str, Tensor]:
        """Return the averages, of each process its own shards."""
        parts = {"moving": self.moving, "ring": self.ring}
        return {
            f"{name}/{key}": tensor
            for name, part in parts.items()
            if part is not None
            for key, tensor in part.state_dict().items()
        }

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Keep what was remembered for :meth:`make`, which knows the model."""
        for name in ("moving", "ring"):
            start = f"{name}/"
            self.before[name] = {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}

    def finish(self, _trainer: PartsTrainer) -> dict[str, Any]:
        """Return how often the averages were updated."""
        found: dict[str, Any] = {}
        if self.moving is not None and self.moving.updates:
            found["moving_average"] = {"updates": self.moving.updates}
        if self.ring is not None and len(self.ring.snapshots):
            found["snapshots"] = {"steps": self.ring.snapshots.steps}
        return {"average": found} if found else {}

    def variants(self) -> dict[str, AbstractContextManager[None]]:
        """Return the averages, each to be saved as the model is."""
        return {name: average.in_place() for name, average in self.averages().items()}
