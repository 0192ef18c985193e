"""Workers of a Trainer that choose what they train on next: a stream of rows, and a callback that feeds the choice.

::

    scheduler = DomainScheduler(similarities(features), workers=2, knobs={"eta": 10.0})
    stream = DomainStream(rows_by_domain, scheduler, batch=4)
    trainer = Trainer(model, args, train_dataset=stream, callbacks=[DomainCallback(stream, probes, every=10)])

Set ``max_steps``, and ``per_device_train_batch_size`` to ``batch``: each process is one worker. One process stands for
all workers with a batch of workers × ``batch``. The choice of every batch is kept in the checkpoint, so that a training
that goes on reads the same rows. A batch that the loader fetched before a round ended keeps the domain of that round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback

from modicum import processes
from modicum.errors import CheckpointError, RecipeError, TrainingError
from modicum.random import generator
from modicum.record import digest
from modicum.submodular.data_selection import DomainScheduler

FILE = "domains.safetensors"
LOADERS = (
    "A process of the loader's would read with a copy of the scheduler, which never learns. Set dataloader_num_workers "
    "to 0."
)


class DomainStream(IterableDataset):  # type: ignore[type-arg]
    """Rows of the domains that a scheduler chooses, batch by batch and worker by worker, without end.

    Args:
        rows: The rows of each domain, in the order of the scheduler's domains; each is gone through in a shuffled order
            of its own, again and again.
        scheduler: Chooses a domain for every worker.
        batch: Rows of one worker's batch.
        seed: Seed of the orders.

    Raises:
        RecipeError: A domain has no rows, or there are other domains than the scheduler's.
    """

    def __init__(
        self, rows: Mapping[str, Sequence[Any]], scheduler: DomainScheduler, *, batch: int, seed: int = 0
    ) -> None:
        if list(rows) != scheduler.domains:
            raise RecipeError(f"rows are of domains {list(rows)}, but the scheduler has {scheduler.domains}.")
        if empty := [name for name, part in rows.items() if not len(part)]:
            raise RecipeError(f"domain {empty[0]} has no rows. Leave it out.")
        if batch < 1:
            raise RecipeError(f"batch is {batch}, expected at least 1 row.")
        self.rows, self.scheduler, self.batch, self.seed = list(rows.values()), scheduler, batch, seed
        self.history: list[list[int]] = []  # the domains of each batch, by worker
        self._orders: dict[tuple[int, int], Tensor] = {}

    def __iter__(self) -> Iterator[Any]:
        if get_worker_info() is not None:
            raise TrainingError(LOADERS)
        taken = torch.zeros(self.scheduler.workers, len(self.rows), dtype=torch.long)
        number = 0
        while True:
            if number == len(self.history):
                self.history.append(self.scheduler.next_domains())
            for worker, domain in enumerate(self.history[number]):
                for _ in range(self.batch):
                    yield self._row(worker, domain, int(taken[worker, domain]))
                    taken[worker, domain] += 1
            number += 1

    def _row(self, worker: int, domain: int, count: int) -> Any:
        rows = self.rows[domain]
        # All workers go through a domain in one order, each from a place of its own, so that they read different rows.
        place = count + worker * len(rows) // self.scheduler.workers
        epoch, place = divmod(place, len(rows))
        if (domain, epoch) not in self._orders:
            rng = generator(self.seed, "domain rows", domain, epoch)
            self._orders[domain, epoch] = torch.randperm(len(rows), generator=rng)
        return rows[int(self._orders[domain, epoch][place])]

    def tokens(self) -> Tensor:
        """Return how many batches of each domain were begun, by all workers."""
        flat = torch.tensor(self.history, dtype=torch.long).flatten()
        return torch.bincount(flat, minlength=len(self.rows))


class DomainCallback(TrainerCallback):
    """Measure the probes after every round, let the scheduler learn, and keep its state with the checkpoints.

    Args:
        stream: The stream that the Trainer reads.
        probes: A batch of held-out rows of each probe, with labels, as the model takes them.
        every: Optimiser steps of a round.

    Attributes:
        losses: The losses of the probes after each round.
        shares: The probability of each domain for each worker in each round, (rounds, workers, domains).
    """

    def __init__(self, stream: DomainStream, probes: Sequence[Mapping[str, Tensor]], *, every: int) -> None:
        if every < 1:
            raise RecipeError(f"every is {every}, expected at least 1 step.")
        if len(probes) != len(stream.scheduler.similarity):
            raise RecipeError(
                f"{len(probes)} probes, but the scheduler's similarity has {len(stream.scheduler.similarity)} rows."
            )
        self.stream, self.probes, self.every = stream, probes, every
        self.losses: list[list[float]] = []
        self.shares: list[list[list[float]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Check that each process reads whole batches of workers, and go on from a checkpoint where there is one.

        Raises:
            RecipeError: The Trainer's batches are of another size, or loaders of its own read them.
            CheckpointError: The state beside the checkpoint cannot be read.
        """
        if args.dataloader_num_workers:
            raise RecipeError(LOADERS)
        workers, batch, world = self.stream.scheduler.workers, self.stream.batch, processes.world()
        if args.train_batch_size % batch or args.train_batch_size * world != workers * batch:
            raise RecipeError(
                f"{world} processes with batches of {args.train_batch_size} rows: expected {workers} workers of "
                f"{batch} rows, {workers * batch / world:g} for each process (per_device_train_batch_size)."
            )
        if not state.global_step:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        try:
            tensors = load_file(folder / FILE)
            self.stream.history = tensors.pop("history").tolist()
            self.losses, self.shares = tensors.pop("losses").tolist(), tensors.pop("shares").tolist()
        except (OSError, KeyError) as error:
            raise CheckpointError(
                f"Cannot read {folder / FILE}: {error}. The choice of domains cannot go on."
            ) from None
        self.stream.scheduler.load_state_dict(tensors)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """End a round where it ends."""
        if state.global_step % self.every:
            return
        losses = processes.broadcast(self._measure(kwargs["model"]))
        self.losses.append(losses.tolist())
        self.shares.append(self.stream.scheduler.shares().tolist())
        self.stream.scheduler.observe(losses)
        self._agree()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Write the state beside the checkpoint."""
        if not processes.main():
            return
        probes = len(self.probes)
        own = {
            "history": torch.tensor(self.stream.history, dtype=torch.long).reshape(-1, self.stream.scheduler.workers),
            "losses": torch.tensor(self.losses, dtype=torch.float64).reshape(-1, probes),
            "shares": torch.tensor(self.shares, dtype=torch.float64).reshape(
                -1, self.stream.scheduler.workers, len(self.stream.rows)
            ),
        }
        tensors = {**own, **self.stream.scheduler.state_dict()}
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / FILE)

    def _measure(self, model: Any) -> Tensor:
        training = model.training
        model.eval()
        device = next(model.parameters()).device
        inner = getattr(model, "module", model)
        with torch.no_grad():
            found = [
                float(inner(**{name: part.to(device) for name, part in probe.items()}).loss) for probe in self.probes
            ]
        model.train(training)
        return torch.tensor(found, dtype=torch.float64)

    def _agree(self) -> None:
        """Raise unless all processes made the same choices so far."""
        if processes.world() == 1:
            return
        text = digest([self.losses, self.stream.scheduler.next_domains()])
        marks = processes.gather(torch.tensor([int(text[:15], 16)]))
        if bool((marks != marks[0]).any()):
            raise TrainingError(
                "The processes chose different domains: their schedulers were made or fed differently. Give all "
                "the same similarity, seed and probes."
            )
