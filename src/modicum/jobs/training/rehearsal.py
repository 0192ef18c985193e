"""A Trainer of a toy under the user's arguments: what transformers refuses once a model is loaded, refused before.

``TrainingArguments`` takes many values that only the Trainer, its optimiser or its loader refuses: a batch of no rows,
an optimiser or a logger whose package is missing, a schedule without the number that it needs.
"""

from __future__ import annotations

import copy
import random
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from modicum.borders import MALFORMED
from modicum.errors import RecipeError, first_line
from modicum.shortage import pass_on

if TYPE_CHECKING:
    from transformers import TrainingArguments

REFUSALS = (*MALFORMED, ImportError, OSError, RuntimeError, ZeroDivisionError, NotImplementedError, AssertionError)
MOST_WORKERS = 1024
ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second")  # what every evaluation measures


@dataclass
class _Rows:
    """So many rows of one token."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        if place >= self.count:  # which ends an iteration
            raise IndexError(place)
        return {"input_ids": [0]}


def refuse_arguments(arguments: TrainingArguments, *, rows: int, own_optimizer: bool, own_metrics: bool) -> None:
    """Refuse arguments under which no Trainer can be made, or none that takes a step.

    Nothing is tried where the engine is one of several processes, which a check does not start.

    Args:
        arguments: The trainer's.
        rows: How many there are to train on.
        own_optimizer: A part of the recipe brings the optimiser.
        own_metrics: A part of the recipe brings metrics of evaluations.

    Raises:
        RecipeError: There can be no such Trainer.
    """
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if (value := getattr(arguments, name)) < 1:
            raise RecipeError(f"trainer.{name} is {value}, expected 1 or more.")
    if arguments.max_steps == 0:
        raise RecipeError("trainer.max_steps is 0, which trains nothing. Set 1 or more, or leave it out for epochs.")
    if (workers := arguments.dataloader_num_workers) > MOST_WORKERS:
        raise RecipeError(
            f"trainer.dataloader_num_workers is {workers}, expected at most {MOST_WORKERS}: each is a process. Start "
            "one for each core, or fewer."
        )
    if (noise := arguments.neftune_noise_alpha or 0) < 0:
        raise RecipeError(f"trainer.neftune_noise_alpha is {noise}, expected 0 or more.")
    if arguments.use_liger_kernel and find_spec("liger_kernel") is None:  # which a Trainer asks for a real model alone
        raise RecipeError("trainer.use_liger_kernel needs a package. Install it: pip install liger-kernel.")
    batch = arguments.train_batch_size
    if arguments.dataloader_drop_last and rows < batch:
        raise RecipeError(
            f"trainer.dataloader_drop_last leaves out all {rows} rows: they make no whole batch of {batch}. Lower "
            "trainer.per_device_train_batch_size, or leave it out."
        )
    best = arguments.metric_for_best_model
    if best is not None and not own_metrics and best.removeprefix("eval_") not in ALWAYS:
        raise RecipeError(
            f"trainer.metric_for_best_model is {best!r}, which no evaluation of this training measures. Set eval_loss."
        )
    if arguments.world_size == 1 and not arguments.fsdp and not arguments.deepspeed:
        _try(arguments, rows, own_optimizer)


def _try(arguments: TrainingArguments, rows: int, own_optimizer: bool) -> None:
    import numpy as np
    import torch
    from transformers import PreTrainedConfig, Trainer

    data, states = _Rows(rows), (random.getstate(), np.random.get_state())  # which the Trainer seeds
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            own = copy.copy(arguments)
            own.output_dir, own.full_determinism = folder, False
            toy = torch.nn.Linear(1, 1)
            toy.config = PreTrainedConfig()
            trainer = Trainer(toy, own, lambda _: {}, train_dataset=data, eval_dataset=data)
            trainer.get_train_dataloader()
            if not own_optimizer and own.optim_target_modules is None:  # of which a toy has none
                trainer.create_optimizer_and_scheduler(max(1, own.max_steps))
    except REFUSALS as error:
        pass_on(error)
        raise RecipeError(f"trainer: {first_line(error)}") from None
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
