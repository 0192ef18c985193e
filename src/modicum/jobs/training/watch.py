"""Whether a training goes on well: losses and weights that are finite, and steps that were done."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import processes
from modicum.errors import TrainingError
from modicum.jobs.training.checkpoints import last_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

KEPT = ("logged", "last_is_bad", "count", "good", "total", "recent")  # what a resumed run has to know of the losses
EVERY = 100  # steps after which the losses are looked at, where nothing is logged or saved


class LossWatch:
    """Losses since the last look, which stay on their device: a look at every step would make it wait for each.

    Sums are those of Python's numbers, one after the other, so that they do not depend on when one looks.

    Attributes:
        step: The step that is being done, from 1 on.
        first: The first step whose loss was not finite.
        count: How many losses were not finite.
        good: How many were.
        total: Sum of the finite losses of all micro-batches.
        recent: Sum of all losses since the last line of the log.
        logged: The step of that line.
    """

    def __init__(self) -> None:
        self.step = self.logged = 0
        self.first: int | None = None
        self.last_is_bad = False
        self.count = self.good = 0
        self.total = self.recent = 0.0
        self._seen: list[tuple[int, Tensor]] = []
        self._device: Any = "cpu"

    def __call__(self, loss: Tensor) -> None:
        """See the loss of a micro-batch."""
        self._device = loss.device
        self._seen.append((self.step, loss.detach()))

    def look(self) -> bool:
        """Return whether any loss since the last look was not finite."""
        import torch

        if not self._seen:
            return False
        steps, losses = zip(*self._seen)
        self._seen = []
        values = torch.stack([loss.float().mean() for loss in losses]).tolist()
        bad = [not math.isfinite(value) for value in values]
        self.last_is_bad = any(flag for step, flag in zip(steps, bad) if step == steps[-1])
        for value, flag in zip(values, bad):
            self.recent += value
            self.total += 0.0 if flag else value
        self.count += sum(bad)
        self.good += len(bad) - sum(bad)
        if any(bad) and self.first is None:
            self.first = steps[bad.index(True)]
        return any(bad)

    def since_logged(self, step: int) -> float:
        """Return the mean loss of the steps since it was last asked for, over all processes."""
        self.look()
        mean = self._over_processes(self.recent) / max(1, step - self.logged)
        self.recent, self.logged = 0.0, step
        return mean

    def mean(self, step: int) -> float:
        """Return the mean loss of the whole run so far, over all processes; losses that are not finite do not count."""
        self.look()
        share = self.good / max(1, self.good + self.count)
        return self._over_processes(self.total / (step * share) if step * share else math.nan)

    def _over_processes(self, value: float) -> float:
        import torch

        if processes.world() == 1:
            return value
        return float(processes.mean(torch.tensor([value], device=self._device), 1.0))

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run has to know of the losses so far."""
        import torch

        self.look()
        kept = {key: torch.tensor(getattr(self, key), dtype=torch.float64) for key in KEPT}
        return kept | {"first": torch.tensor(self.first or 0)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See :meth:`state`."""
        for key in KEPT:
            setattr(self, key, type(getattr(self, key))(state[key].item()))
        self.first = int(state["first"]) or None


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
    last = last_checkpoint(folder)
    good = f"The last good checkpoint is {last}." if last else "There is no checkpoint from before."
    return TrainingError(f"{what} {good} Try {tips}.")
