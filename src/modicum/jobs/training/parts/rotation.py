"""Keep the newest checkpoints only, readable by whom the umask lets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.durable import follow_umask, sync, sync_tree
from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from modicum.jobs.training.recipe import TrainRecipe


@training_part("rotation")
class Rotation(Part):
    """Delete old checkpoints beyond ``trainer.save_total_limit``, and nothing else.

    The Trainer's own rotation takes every name that begins like a checkpoint for one: it deletes a user's
    ``checkpoint-10-backup``, or counts it as the newest and deletes the only checkpoint of the run.
    """

    def __init__(self, name: str, recipe: TrainRecipe, section: None = None) -> None:
        super().__init__(name, recipe, section)
        self.limit: int | None = recipe.trainer.get("save_total_limit", 2)

    def arguments(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Turn the Trainer's own rotation off."""
        return fields | {"save_total_limit": None}

    def trainer(self, build: Build) -> None:
        """Add the callback."""
        from transformers import TrainerCallback

        from modicum.jobs.training.checkpoints import checkpoints, rotate

        limit = self.limit

        class RotationCallback(TrainerCallback):
            def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
                if not args.should_save:
                    return
                for path in checkpoints(Path(args.output_dir))[-1:]:
                    follow_umask(path)
                    sync_tree(path)  # before an older one, which is whole on the disk, is deleted
                    sync(path.parent)
                if limit is not None and limit > 0:
                    rotate(args.output_dir, limit, best=state.best_model_checkpoint)

        build.add_callback(RotationCallback())
