"""Keep the samples of packed rows apart, or refuse to train on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modicum.jobs.training.batches import Batches
from modicum.jobs.training.parts import Build, Data, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from modicum.jobs.training.recipe import TrainRecipe


@training_part("packing", order=5)
class Packing(Part):
    """Try before training whether the model keeps packed samples apart; comes first, so that all parts see the mask."""

    packed = False
    collator: Any = None

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether rows may be packed."""
        return recipe.data.packing or (recipe.eval_data is not None and recipe.eval_data.packing)

    def data(self, data: Data) -> Data:
        """See whether encoded rows hold several samples: text packed into blocks is one stream."""

        def encode(*values: Any, **named: Any) -> Any:
            found = data.encode(*values, **named)
            self.packed = self.packed or "position_ids" in found.column_names
            return found

        watched: Callable[..., Any] = encode
        return replace(data, encode=watched)

    def foresee(self, note: Callable[[str], None], _model: Any, _tokenizer: Any) -> None:
        """Try a small model of the same architecture."""
        from modicum.jobs.data.packing_trial import LATER, foresee

        section = self.recipe.model
        if not self.packed:
            return
        if section.convert is not None:
            note(LATER)
        elif told := foresee(
            section.path,
            max_length=self.longest,
            fields=section.scratch,
            attention=section.attention,
            remote_code=section.remote_code,
        ):
            note(told)

    @property
    def longest(self) -> int:
        """Tokens of the longest row that may come."""
        sections = [section for section in (self.recipe.data, self.recipe.eval_data) if section is not None]
        return max(section.max_length for section in sections)

    def model(self, model: Any, tokenizer: Any) -> Any:
        """Keep some tokens to try with."""
        from modicum.jobs.data.packing import ordinary_ids

        self.ids = ordinary_ids(tokenizer)
        return model

    def start(self, model: Any, batches: Batches) -> None:
        """Try the model, and find the collator that keeps samples apart."""
        from modicum.jobs.data.packing import isolating

        if not self.packed:
            return
        arguments = batches.arguments
        if model.device.type != arguments.device.type and not (arguments.fsdp or arguments.deepspeed):
            model.to(arguments.device)  # as the Trainer does; kernels differ from one device to the other
        found = isolating(model, batches.collator, ids=self.ids, max_length=self.longest)
        if found is not batches.collator:
            self.run.note(
                f"{model.config.model_type} keeps packed samples apart with a mask of tokens by tokens, built for each "
                "batch."
            )
        self.collator = batches.collator = found

    def trainer(self, build: Build) -> None:
        """Give the collator to the Trainer."""
        if self.collator is not None:
            build.data_collator = self.collator
