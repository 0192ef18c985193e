"""Averages of the weights on the way: the recipe's ``average``."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, model_validator

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Part
from modicum.recipe import Section, choice
from modicum.registry import averager, training_part
from modicum.schema import explain
from modicum.types import Decay, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.jobs.training.average_callback import AverageCallback
    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import PartsTrainer


class MovingSection(Section):
    """A moving average of the trained weights."""

    decay: Decay | None = Field(default=0.999, description="what an update multiplies the past by; null for the mean")
    every: PositiveInt = Field(default=1, description="optimiser steps between updates")
    start: NonNegativeInt = Field(default=0, description="the step before the first update")


class RingSection(Section):
    """The latest snapshots of the trained weights, and their mean."""

    keep: PositiveInt = Field(default=10, description="how many")
    every: PositiveInt = Field(description="optimiser steps between snapshots")
    method: choice(averager) = Field(default="uniform", validate_default=True, description="the rule of averaging")  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _is_a_rule(self) -> RingSection:
        from modicum.weights.average import choose

        method: Any = self.method
        if averager[method.name].facts.learns:
            raise ValueError(f"{method.name} learns from data: save checkpoints, and average them by the job average")
        choose(range(self.keep), method=method.name, **method.knobs)
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

    @classmethod
    def of(cls, given: AverageSection | Mapping[str, Any]) -> AverageSection:
        """Return a section as it is, or that of its keys.

        Raises:
            RecipeError: A key is wrong.
        """
        if isinstance(given, AverageSection):
            return given
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise RecipeError(explain(error, "average", cls)) from None


def check_engine(*, deepspeed: bool, fsdp: int | None, adapter: bool) -> None:
    """Refuse engines that keep the weights to themselves.

    Args:
        deepspeed: DeepSpeed trains.
        fsdp: The version of FSDP that trains, if one does.
        adapter: An adapter is trained.

    Raises:
        UnsupportedError: The weights cannot be averaged on the way.
    """
    if deepspeed:
        raise UnsupportedError(
            "average: DeepSpeed keeps the weights to itself. Use DDP or FSDP2 (fsdp_config: {fsdp_version: 2})."
        )
    if fsdp is not None and fsdp < 2:
        raise UnsupportedError("average: FSDP 1 flattens the weights. Set fsdp_config: {fsdp_version: 2}.")
    if fsdp is not None and adapter:
        raise UnsupportedError(
            "average: products of sharded factors are not averaged on the way. Save checkpoints, and average them "
            "by the job average; or train the adapter with DDP."
        )


@training_part("average", section=AverageSection, description="averages of the weights on the way", order=60)
class Average(Part):
    """Keep averages of the trained weights, evaluate them with every evaluation, and save them beside the model."""

    section: AverageSection
    callback: AverageCallback | None = None

    def __init__(self, name: str, recipe: TrainRecipe, section: AverageSection) -> None:
        super().__init__(name, recipe, section)
        self.before: dict[str, dict[str, Tensor]] = {}  # what a checkpoint holds of them

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse engines that keep the weights to themselves, and checkpoints that would be gone."""
        config: Mapping[str, Any] = arguments.fsdp_config or {}
        version = int(config.get("version", config.get("fsdp_version", 2))) if arguments.fsdp else None
        adapter = self.recipe.section("adapter") is not None
        check_engine(deepspeed=bool(arguments.deepspeed), fsdp=version, adapter=adapter)
        limit = self.recipe.trainer.get("save_total_limit", 2)
        if self.section.window is not None and limit is not None and 0 < limit < self.section.window:
            raise RecipeError(
                f"average.window is {self.section.window}, but trainer.save_total_limit keeps {limit} checkpoints "
                f"(2 when not given). Set it to {self.section.window} or more."
            )

    def trainer(self, build: Build) -> None:
        """Add the callback that updates and evaluates."""
        from modicum.jobs.training.average_callback import AverageCallback

        def tell(state: Any, losses: dict[str, float]) -> None:
            if state.is_world_process_zero:
                self.run.log("average", step=state.global_step, **losses)
                told = " ".join(f"{name} {loss:.4g}" for name, loss in losses.items())
                self.run.say(f"step {state.global_step} {told}")

        def loss(model: Any, batch: Mapping[str, Any]) -> Any:
            return model(**batch).loss if (own := build.own_loss) is None else own(model, batch)[0]

        self.callback = AverageCallback(self.section, seed=self.recipe.seed, loss=loss, tell=tell)
        self.callback.load_state_dict(self.before)
        build.add_callback(self.callback)

    def remember(self) -> dict[str, Tensor]:
        """Return the averages, of each process its own shards."""
        parts = self.callback.state_dict() if self.callback is not None else {}
        return {f"{name}/{key}": tensor for name, part in parts.items() for key, tensor in part.items()}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Keep what was remembered for the callback, which knows the model at its first step."""
        for name in ("moving", "ring"):
            start = f"{name}/"
            self.before[name] = {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}

    def finish(self, _trainer: PartsTrainer) -> dict[str, Any]:
        """Return how often the averages were updated."""
        found: dict[str, Any] = {}
        moving, ring = (self.callback.moving, self.callback.ring) if self.callback is not None else (None, None)
        if moving is not None and moving.updates:
            found["moving_average"] = {"updates": moving.updates}
        if ring is not None and ring.ready:
            found["snapshots"] = {"steps": ring.snapshots.steps}
        elif ring is not None:
            self.run.note(
                f"average.snapshots took {len(ring.snapshots)} snapshots, too few for {ring.method}: none are averaged"
            )
        return {"average": found} if found else {}

    def variant_names(self) -> list[str]:
        """Return the names of the averages that the section asks for."""
        asked = {"moving_average": self.section.moving, "snapshots": self.section.snapshots}
        return [name for name, section in asked.items() if section is not None]

    def variants(self) -> dict[str, AbstractContextManager[None]]:
        """Return the averages, each to be saved as the model is."""
        averages = self.callback.averages() if self.callback is not None else {}
        return {name: average.in_place() for name, average in averages.items()}
