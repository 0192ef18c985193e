"""Begin every pass over pairs above the blocks that an adapter leaves alone: the recipe's ``cached_blocks``."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Part
from modicum.jobs.training.parts.preferences import preferences_of
from modicum.registry import training_part
from modicum.types import PositiveInt

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from modicum.jobs.training.recipe import TrainRecipe

REFUSED = ("gradient_checkpointing", "fsdp", "deepspeed", "torch_compile")


@training_part(
    "cached_blocks",
    section=PositiveInt,
    description="lowest blocks, left alone by the adapter, whose states a process computes once for each pair",
    order=15,  # before the pairs are given to the Trainer
)
class CachedBlocks(Part):
    """Give each pair the states of the lowest blocks, which no step changes."""

    section: int

    def __init__(self, name: str, recipe: TrainRecipe, section: int) -> None:
        super().__init__(name, recipe, section)
        adapter = recipe.section("adapter")
        named = None if adapter is None else adapter.config.get("layers_to_transform")
        numbers = named if isinstance(named, list) else [named]
        if not numbers or not all(isinstance(number, int) and number >= section for number in numbers):
            raise RecipeError(
                f"cached_blocks: {section} needs an adapter that leaves these blocks alone: list blocks from {section} "
                "on in adapter.config.layers_to_transform, or leave out cached_blocks."
            )

    def fit(self, parts: Sequence[Part]) -> None:
        """Refuse rows that are no pairs."""
        if preferences_of(parts) is None:
            raise RecipeError("cached_blocks keeps states of pairs of answers: set objective: dpo, or leave it out.")

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse what computes blocks again, or has them in pieces."""
        if set_ := [key for key in REFUSED if getattr(arguments, key, None)]:
            raise UnsupportedError(f"cached_blocks and trainer.{set_[0]} came together. Drop one.")

    def trainer(self, build: Build) -> None:
        """Compute the states, or say why every pass has to begin at the tokens."""
        from modicum.jobs.training.lower_blocks import LowerBlocks
        from modicum.jobs.training.partial_passes import is_above
        from modicum.jobs.training.preferences import autocast_of

        model = build.model
        moved = [n for n, p in model.named_parameters() if p.requires_grad and not is_above(n, self.section)]
        if moved:
            raise UnsupportedError(f"cached_blocks: {self.section}: {moved[0]} is trained below. Lower it, or drop it.")
        if (pairs := preferences_of(build.parts)) is None:
            return
        every = [*chain(*pairs.sets.values())]
        try:
            lower = LowerBlocks(model, self.section, every[0], pairs.collator, autocast=autocast_of(build.args))
            found = iter(lower.under(every))
        except UnsupportedError as error:
            self.run.note(f"cached_blocks: {self.section} is off, and passes begin at the tokens: {error}.")
            return
        pairs.sets = {kind: [next(found) for _ in own] for kind, own in pairs.sets.items()}
