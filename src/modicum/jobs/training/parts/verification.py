"""Compare the saved folder with the trained model before the run is done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError
from modicum.jobs.training.parts import Build, Part
from modicum.registry import training_part

if TYPE_CHECKING:
    from modicum.jobs.training.trainer import PartsTrainer


@training_part("verification", order=-10)
class Verification(Part):
    """Load what was saved as a user would, and refuse it where its logits are not the trained model's.

    It is the first part, so that it sees the model before others bring it into the form in which it is saved.
    """

    rows: list[list[int]]
    trained: Any = None
    network: Any = None

    def trainer(self, build: Build) -> None:
        """Keep a few rows of the training data."""
        from modicum.jobs.training.verification import sample

        self.rows = sample(build.train_dataset)

    def finish(self, trainer: PartsTrainer) -> dict[str, Any]:
        """Compute the trained model's logits, on the first process."""
        from modicum.jobs.training.verification import logits_of

        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            # Every process would have to take part, and none can hold the whole.
            self.run.note("The weights are split over processes: the saved folder was not compared with them.")
        elif self.run.main and self.rows:
            # Without the autocast that the Trainer puts around the model's forward pass.
            self.network = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
            self.trained = logits_of(self.network, self.rows)
        return {}

    def verify(self, folder: Path, parts: Sequence[Part]) -> None:
        """Refuse a saved folder that is not the trained model."""
        if self.trained is None:
            return
        from modicum.jobs.training.verification import check_saved

        section = self.recipe.model
        try:
            check_saved(
                folder,
                self.trained,
                self.rows,
                without={token for part in parts for token in part.own_tokens},
                dtype=getattr(self.network, "dtype", "auto"),
                device=self._release(),
                attention=section.attention,
                allow_pickle=section.allow_pickle,
                remote_code=section.remote_code,
            )
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} The checkpoints under {self.run.folder / 'checkpoints'} hold the trained weights. "
                "Please report this recipe; a simpler adapter.config may work."
            ) from None

    def _release(self) -> Any:
        """Return the trained model's device, which is made free for the saved one."""
        device = next(self.network.parameters()).device
        self.network.zero_grad(set_to_none=True)
        if device.type != "cpu" and not getattr(self.network, "is_quantized", False):
            self.network.to("cpu")
        return device
