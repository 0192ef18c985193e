"""The training data as plain batches, for parts that look at them before training begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sized
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments


def optimizer_steps(arguments: TrainingArguments, rows: int) -> int:
    """Return how many optimiser steps the Trainer is going to do with so many rows."""
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    epochs = arguments.num_train_epochs
    return arguments.max_steps if arguments.max_steps > 0 else math.ceil(math.ceil(rows / batch) * epochs)


@dataclass
class Batches:
    """Calling it gives the first batches of a run as plain tokens: no part encodes the rows or changes the batch.

    Args:
        load: Reads and encodes the rows; called when the batches are first asked for.
        collator: Makes a batch.
        arguments: The trainer's.
        seed: Of the order.
    """

    load: Callable[[], Sized]
    collator: Any
    arguments: TrainingArguments
    seed: int

    def __call__(self) -> Any:
        """Return a loader over this process' share of the data, in the order of the seed."""
        from torch.utils.data import DataLoader

        from modicum.random import generator

        order = generator(self.seed, "adapter", "batches", self.arguments.process_index)
        size = self.arguments.per_device_train_batch_size
        return DataLoader(self._rows, batch_size=size, shuffle=True, generator=order, collate_fn=self.collator)

    @property
    def steps(self) -> int:
        """Optimiser steps of the run."""
        return optimizer_steps(self.arguments, len(self._rows))

    @cached_property
    def _rows(self) -> Any:
        return self.load()
