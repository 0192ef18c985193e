"""The one subclass of ``transformers.Trainer``. Imported when a training begins, since transformers takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from transformers import PrinterCallback, Trainer

from modicum.jobs.training.extra_modules import additions

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from modicum.jobs.training.parts import Build


class Loss(Protocol):
    """The loss of a batch, where it is not the model's own."""

    def __call__(
        self, model: Any, inputs: Mapping[str, Any], *, branches: int = 1
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the mean loss over the batch, and tensors with one entry for each row, which an evaluation collects.

        Args:
            model: The model, possibly wrapped.
            inputs: The batch.
            branches: Points at which an optimiser with ``engine="paired"`` evaluates the model at once; for several,
                the loss is a vector with one entry for each.
        """
        ...


class Step(Protocol):
    """A training step without a backward pass."""

    def __call__(self, trainer: PartsTrainer, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """Evaluate a micro-batch and return its share of the step's loss."""
        ...


class PartsTrainer(Trainer):
    """A Trainer whose loss and training step may be a part's.

    Four methods are overridden, and nothing is ever assigned over a method of an instance:

    * ``training_step`` hands the micro-batch to ``own_step``, where there is one, instead of the backward pass;
    * ``compute_loss`` asks ``own_loss``, where there is one, instead of the model;
    * ``get_batch_samples`` gives no batch to a run that was over when it was killed, which a Trainer would train for
      another step;
    * ``get_decay_parameter_names`` spares the modules that a conversion added to the model (see
      :func:`~modicum.jobs.training.extra_modules.additions`).

    Args:
        own_loss: Computes the loss.
        own_step: Does the training step.
        watchers: See the loss of every micro-batch, before the optimiser's step.
        arguments: Arguments of ``transformers.Trainer``.
    """

    def __init__(
        self,
        *,
        own_loss: Loss | None = None,
        own_step: Step | None = None,
        watchers: Sequence[Callable[[Tensor], None]] = (),
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.own_loss, self.own_step, self.watchers = own_loss, own_step, watchers
        if own_loss is not None:
            # It is a mean over the batch: the Trainer divides by the micro-batches of a step, not by their labels.
            self.loss_is_scaled_for_ga = False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Do a micro-batch; see the class."""
        if self.own_step is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self.own_step(self, model, self._prepare_inputs(inputs))
        for see in self.watchers:
            see(loss)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a batch, and the model's or the own loss' outputs where asked; see the class."""
        if self.own_loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self.own_loss(model, inputs)
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """Return the micro-batches of a step; see the class."""
        if self.control.should_training_stop:  # a callback said so before the first step
            return [], None
        found: tuple[list[Any], Tensor | int | None] = super().get_batch_samples(epoch_iterator, num_batches, device)
        return found

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the parameters that weight decay shrinks; see the class."""
        spared = tuple(f"{name}." for name in additions(model))
        return [name for name in super().get_decay_parameter_names(model) if not name.startswith(spared)]


def build_trainer(build: Build) -> PartsTrainer:
    """Return the Trainer that the parts have put together."""
    arguments = dict(vars(build))
    del arguments["parts"]
    trainer = PartsTrainer(optimizers=(arguments.pop("optimizer"), None), **arguments)
    trainer.remove_callback(PrinterCallback)  # the run's log prints a line instead
    return trainer
