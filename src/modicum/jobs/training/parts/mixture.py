"""Mixtures in training: pair accuracy by dimension, and rounds whose weights follow validation; ``data: {mix: …}``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Part
from modicum.jobs.training.parts.preferences import Preferences, preferences_of
from modicum.registry import training_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.jobs.data.pairs import Pair
    from modicum.jobs.data.section import Mix
    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.rounds import RoundStream
    from modicum.jobs.training.trainer import PartsTrainer


@training_part("mixture", order=30)
class Mixture(Part):
    """Draw the pairs of each round by weights that follow validation, and tell the dimensions apart."""

    preferences: Preferences | None = None
    stream: RoundStream | None = None

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether data or evaluation data are mixtures."""
        return any(section is not None and section.mix is not None for section in (recipe.data, recipe.eval_data))

    def __init__(self, name: str, recipe: TrainRecipe, section: Any = None) -> None:
        super().__init__(name, recipe, section)
        mix = recipe.data.mix
        self.rounds = None if mix is None else mix.rounds
        held_out = None if recipe.eval_data is None else recipe.eval_data.mix
        if held_out is not None and held_out.rounds is not None:
            raise RecipeError("eval_data.mix.rounds: rounds are those of the training data. Set data.mix.rounds.")
        if self.rounds is None or mix is None:
            return
        if held_out is None or {*held_out.parts} != {*mix.parts}:
            raise RecipeError(
                "data.mix.rounds follows the validation of each dimension: set eval_data.mix with the same parts, "
                f"{', '.join(mix.parts)}."
            )
        if recipe.trainer.get("max_steps", 0) < self.rounds.count:
            raise RecipeError(
                f"data.mix.rounds has {self.rounds.count} rounds of steps: set trainer.max_steps to at least as many."
            )

    def fit(self, parts: Sequence[Part]) -> None:
        """Refuse rounds of rows that are no pairs."""
        if self.rounds is not None and preferences_of(parts) is None:
            raise RecipeError("data.mix.rounds compares pairs: set objective: dpo.")

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Let every process read the stream by itself: a batch of pairs cannot be cut into shares."""
        return fields if self.rounds is None else {"accelerator_config": {"dispatch_batches": False}} | fields

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse what a stream cannot have."""
        if self.rounds is None:
            return
        if arguments.dataloader_num_workers:
            raise UnsupportedError("data.mix.rounds draws pairs as it goes: leave out trainer.dataloader_num_workers.")

    def trainer(self, build: Build) -> None:
        """Replace the training pairs by the stream of rounds."""
        from modicum.jobs.training.rounds import RoundStream, round_callback

        self.preferences = pairs = preferences_of(build.parts)
        mix = self.recipe.data.mix
        for training, section in ((True, self.recipe.data), (False, self.recipe.eval_data)):
            if pairs is not None and section is not None and section.mix is not None:
                _by_dimension(pairs.sets[training], _drawn(section.mix))  # refused before the training, not after it
        if self.rounds is None or pairs is None or mix is None:
            return
        arguments = build.args
        step = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
        steps = arguments.max_steps // self.rounds.count
        self.stream = stream = RoundStream(
            _by_dimension(pairs.sets[True], mix.parts), mix.shares, step=step, steps=steps, seed=self.recipe.seed
        )
        build.train_dataset = stream
        build.add_callback(
            round_callback(
                stream,
                _by_dimension(pairs.sets[False], mix.parts),
                pairs.collator,
                eta=self.rounds.eta,
                rounds=self.rounds.count,
                say=lambda told: self.run.log("round", **told),
            )
        )

    def remember(self) -> dict[str, Tensor]:
        """Return the weights of all rounds so far."""
        from modicum.jobs.training.rounds import weights_of

        return {} if self.stream is None else {"weights": weights_of(self.stream)}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the weights of the run before."""
        if state and self.stream is not None:
            self.stream.weights = state["weights"].tolist()

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Return the pair accuracy of each dimension on the evaluation data, and the weights of all rounds."""
        from modicum.jobs.training.rounds import accuracies

        found: dict[str, Any] = {}
        if self.stream is not None:
            found["rounds"] = [dict(zip(self.stream.pairs, weights)) for weights in self.stream.weights]
        pairs, section = self.preferences, self.recipe.eval_data
        if pairs is not None and section is not None and section.mix is not None:
            held_out = _by_dimension(pairs.sets[False], _drawn(section.mix))
            values = accuracies(trainer.model, held_out, pairs.collator)
            found["dimensions"] = {
                name: {"pair_accuracy": value, "n": len(part)} for (name, part), value in zip(held_out.items(), values)
            }
        return found


def _drawn(mix: Mix) -> list[str]:
    """Return the parts from which something is drawn."""
    return [name for name, share in zip(mix.parts, mix.shares) if share > 0]


def _by_dimension(pairs: list[Pair], names: Iterable[str]) -> dict[str, list[Pair]]:
    found = {name: [pair for pair in pairs if pair.dimension == name] for name in names}
    if empty := [name for name, part in found.items() if not part]:
        raise RecipeError(f"mix: no pair of {empty[0]} is left. Give it more rows, or a larger max_length.")
    return found
