"""Whether a training goes on well: losses and weights that are finite, and steps that were done."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import TrainingError
from modicum.jobs.training.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

EVERY = 100  # steps after which the losses are looked at, where nothing is logged or saved


class LossWatch:
    """Losses since the last look, which stay on their device: a look at every step would make it wait for each.

    Attributes:
        step: The step that is being done, from 1 on.
        first: The first step whose loss was not finite.
        count: How many losses were not finite.
    """

    def __init__(self) -> None:
        self.step = 0
        self.first: int | None = None
        self.last_is_bad = False
        self.count = 0
        self._seen: list[tuple[int, Tensor]] = []

    def __call__(self, loss: Tensor) -> None:
        """See the loss of a micro-batch."""
        self._seen.append((self.step, loss.detach()))

    def look(self) -> bool:
        """Return whether any loss since the last look was not finite."""
        import torch

        if not self._seen:
            return False
        steps, losses = zip(*self._seen)
        self._seen = []
        bad = (~torch.isfinite(torch.stack([loss.float().mean() for loss in losses]))).tolist()
        self.last_is_bad = any(flag for step, flag in zip(steps, bad) if step == steps[-1])
        self.count += sum(bad)
        if any(bad) and self.first is None:
            self.first = steps[bad.index(True)]
        return any(bad)


def infinite_weights(model: Any) -> Iterator[str]:
    """Yield the names of trained weights that hold NaN or infinite values, as far as this process holds them."""
    import torch

    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter.detach()
        # The sum is NaN or infinite whenever an entry is; the full check runs only then.
        if not torch.isfinite(local.sum(dtype=torch.float32)) and not torch.isfinite(local).all():
            yield name


def diverged(what: str, folder: Path, tips: str) -> TrainingError:
    """Return the error of a run that diverged: what was seen, from where it can go on, and what to try."""
    last = last_checkpoint(folder, delete_broken=False)
    good = f"The last good checkpoint is {last}." if last else "There is no checkpoint from before."
    return TrainingError(f"{what} {good} Try {tips}.")
