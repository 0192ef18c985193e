"""Learn from pairs of answers: the recipe's ``objective`` where it compares a chosen with a rejected answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from modicum import registry
from modicum.errors import RecipeError, UnsupportedError
from modicum.jobs.training.parts import Build, Data, Part
from modicum.recipe import Choice
from modicum.registry import training_part

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import TrainingArguments

    from modicum.evaluate.rows import Rows
    from modicum.jobs.data.pairs import Pair, PairCollator
    from modicum.jobs.training.batches import Batches
    from modicum.jobs.training.preferences import PairLoss
    from modicum.jobs.training.recipe import TrainRecipe
    from modicum.jobs.training.trainer import PartsTrainer

METRICS = ("eval_loss", "eval_accuracy", "eval_margin", "eval_logp_chosen", "eval_logp_rejected")


@training_part("preferences", order=20)
class Preferences(Part):
    """Compare the two answers of each row, in training and evaluation."""

    brings = ("loss",)
    collator: PairCollator
    arguments_: TrainingArguments
    loss: PairLoss

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether the objective is one over pairs."""
        chosen: Choice | None = recipe.section("objective")
        return chosen is not None and registry.objective[chosen.name].facts.acts_on == "pairs"

    def __init__(self, name: str, recipe: TrainRecipe, _section: None = None) -> None:
        super().__init__(name, recipe, recipe.section("objective"))
        self.sets: dict[bool, list[Pair]] = {}
        self.rows: dict[bool, Rows] = {}
        for section in (recipe.data, recipe.eval_data):
            if section is not None and section.packing:
                raise RecipeError(
                    f"{self.section.name} packs the pairs of each batch by itself: leave out data.packing."
                )
            if section is not None and not section.completion_only:
                raise RecipeError(f"{self.section.name} judges answers alone: leave out data.completion_only.")

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Have an evaluation collect the pairs' numbers, and not the loss alone."""
        return {"prediction_loss_only": False} | fields

    def check(self, arguments: TrainingArguments) -> None:
        """Refuse what cannot carry pairs."""
        self.arguments_ = arguments
        if arguments.batch_eval_metrics or not arguments.eval_do_concat_batches:
            raise UnsupportedError(
                f"{self.section.name} takes the numbers of an evaluation as one list. Leave out "
                "trainer.batch_eval_metrics and trainer.eval_do_concat_batches."
            )
        if arguments.n_gpu > 1:
            raise UnsupportedError(
                f"{self.section.name} does not run under DataParallel, which would cut a batch of pairs. Start one "
                "process for each GPU: accelerate launch -m modicum run …"
            )
        optimizer: Choice | None = self.recipe.section("optimizer")
        if optimizer is not None and optimizer.knobs.get("engine") in ("paired", "jvp"):
            raise UnsupportedError(
                f"{self.section.name} compares two answers, which engine={optimizer.knobs['engine']!r} cannot. Use "
                "'adapter'."
            )

    def data(self, data: Data) -> Data:
        """Keep the rows as pairs."""

        def encode(rows: Any, tokenizer: Any, section: Any, *, note: Any) -> list[Pair]:
            from modicum.jobs.data.overlap import check_apart
            from modicum.jobs.data.pairs import encode_pairs

            self.rows[data.training] = data.rows
            if len(self.rows) == 2:
                check_apart(self.rows[True], self.rows[False])
            self.sets[data.training] = found = encode_pairs(rows, tokenizer, section, note=note)
            return found

        return replace(data, encode=encode)

    def model(self, model: Any, tokenizer: Any) -> Any:
        """Ask the reference, which is the model before an adapter surrounds it."""
        from modicum.jobs.data.collators import pad_id
        from modicum.jobs.training.preferences import autocast_of, layout, silence_dropout
        from modicum.jobs.training.references import referenced

        arguments = self.arguments_
        if model.device.type != arguments.device.type and not (arguments.fsdp or arguments.deepspeed):
            model.to(arguments.device)  # as the Trainer does
        self.collator = layout(model, [*chain(*self.sets.values())], pad_id(tokenizer), self.run.note)
        if silence_dropout(model):
            self.run.note("Dropout is off: it would add noise to the margins between two answers.")
        attention = getattr(model.config, "_attn_implementation", None)
        kinds = list(self.sets)
        found = referenced(
            list(self.sets.values()),
            model,
            self.collator,
            precision=f"{model.device.type} {model.dtype} {attention}",
            autocast=autocast_of(arguments),
            note=self.run.say,  # the same run finds more of them known when it goes on
        )
        self.sets = dict(zip(kinds, found))
        return model

    def start(self, model: Any, _batches: Batches) -> None:
        """Turn off the adapter's dropout as well."""
        from modicum.jobs.training.preferences import silence_dropout

        if silence_dropout(model):
            self.run.note("Dropout of the adapter is off: it would add noise to the margins between two answers.")

    def trainer(self, build: Build) -> None:
        """Replace data sets, collator and loss, and measure the pairs."""
        from modicum.jobs.training.preferences import use_pairs

        build.train_dataset = self.sets[True]
        build.eval_dataset = self.sets.get(False)
        self.loss = use_pairs(
            build, self.section.name, self.section.knobs, collator=self.collator, starts_there=self._starts_there()
        )

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Measure the trained model where there is evaluation data."""
        if self.recipe.eval_data is None:
            return {}
        found = trainer.evaluate()
        return {name: found[name] for name in METRICS if name in found}

    def remember(self) -> dict[str, Tensor]:
        """Return the numbers of the pairs that the next line of the log is the mean of."""
        import torch

        return {"seen": torch.cat(self.loss.seen).cpu()} if self.loss.seen else {}

    def recall(self, state: Mapping[str, Tensor]) -> None:
        """Go on with them."""
        self.loss.seen = [state["seen"]] if state else []

    def _starts_there(self) -> bool:
        """Whether the run starts at the reference: an adapter that is trained beforehand does not."""
        adapter: Any = self.recipe.section("adapter")
        init = None if adapter is None else adapter.init
        return init is None or not registry.adapter_init[init.name].facts.preheated


def preferences_of(parts: Sequence[Part]) -> Preferences | None:
    """Return the part that holds the pairs, where there is one."""
    return next((part for part in parts if isinstance(part, Preferences)), None)
