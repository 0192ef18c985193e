"""Compute logits only where a label follows, where nothing needs the others."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from modicum.jobs.data.rows import LabelledLogits
from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from modicum.jobs.training.recipe import TrainRecipe


@training_part("labelled_logits", order=80)
class LabelledLogitsPart(Part):
    """Ask the model for the logits at labelled positions alone; comes after all parts that change the collator."""

    @classmethod
    def wanted(cls, recipe: TrainRecipe) -> bool:
        """Whether labels stand on completions alone."""
        return recipe.data.completion_only

    def trainer(self, build: Build) -> None:
        """Wrap the collator."""
        forward = inspect.signature(getattr(build.model, "get_base_model", lambda: build.model)().forward).parameters
        # Label smoothing and losses of one's own read whole logits; DataParallel would split the list of positions.
        own = build.compute_loss_func or build.own_loss
        if "logits_to_keep" in forward and not (own or build.args.label_smoothing_factor or build.args.n_gpu > 1):
            build.data_collator = LabelledLogits(build.data_collator)
