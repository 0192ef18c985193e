"""Rounds of a mixture whose weights follow validation: a stream of pairs by dimension, and the callback that feeds it.

A round is a number of optimiser steps. After each one every dimension's pair accuracy on held-out pairs moves its
weight (:func:`~modicum.objectives.mixing.hybrid_weights`). A loader fetches a batch before the round ends, so new
weights hold from the second step of a round on; this makes the rows of a run the same wherever it is interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from modicum import processes
from modicum.evaluate.measures.pairs import preferred
from modicum.jobs.data.pairs import Pair, PairCollator
from modicum.jobs.training.references import log_probabilities
from modicum.objectives.mixing import drawn, hybrid_weights, split_by_ratio

if TYPE_CHECKING:
    from transformers import TrainerCallback

MEASURED = 8  # pairs at a time


class RoundStream(IterableDataset):  # type: ignore[type-arg]
    """Pairs of several dimensions, round by round, without end.

    Args:
        pairs: The pairs of each dimension; each is gone through in a shuffled order of its own, again and again.
        weights: Of the first round.
        step: Pairs of an optimiser step, of all processes.
        steps: Optimiser steps of a round.
        seed: Of the orders.

    Attributes:
        weights: Of all rounds that are known so far.
    """

    def __init__(
        self, pairs: Mapping[str, Sequence[Pair]], weights: Sequence[float], *, step: int, steps: int, seed: int
    ) -> None:
        self.pairs, self.step, self.steps, self.seed = dict(pairs), step, steps, seed
        self.weights = [list(weights)]
        self._orders: dict[tuple[str, int], list[int]] = {}

    def __iter__(self) -> Iterator[Pair]:
        taken = dict.fromkeys(self.pairs, 0)
        number = 0
        while True:
            for part, (size, known) in enumerate(((self.step, number - 1), (self.step * (self.steps - 1), number))):
                counts = split_by_ratio(size, self.weights[min(max(known, 0), len(self.weights) - 1)])
                names = [name for name, count in zip(self.pairs, counts) for _ in range(count)]
                for place in drawn(len(names), len(names), self.seed, f"round {number} {part}"):
                    name = names[place]
                    yield self._pair(name, taken[name])
                    taken[name] += 1
            number += 1

    def _pair(self, name: str, count: int) -> Pair:
        own = self.pairs[name]
        time, place = divmod(count, len(own))
        if (name, time) not in self._orders:
            self._orders[name, time] = drawn(len(own), len(own), self.seed, f"{name} {time}")
        return own[self._orders[name, time][place]]


def accuracies(model: Any, pairs: Mapping[str, Sequence[Pair]], collator: PairCollator) -> list[float]:
    """Return in how many of each dimension's pairs the chosen answer has the higher mean log-probability.

    Args:
        model: With a :class:`~modicum.jobs.training.objective.LabelHead` on it.
        pairs: Of each dimension.
        collator: Lays pairs out.

    Cost:
        A forward pass over all pairs, in every process.
    """
    training = model.training
    model.eval()
    found = []
    try:
        with torch.no_grad():
            for part in pairs.values():
                wins: list[float] = []
                for start in range(0, len(part), MEASURED):
                    batch = part[start : start + MEASURED]
                    for pair, (chosen, rejected) in zip(batch, log_probabilities(model, collator(batch)).tolist()):
                        wins.append(preferred(chosen / len(pair.chosen), rejected / len(pair.rejected)))
                found.append(sum(wins) / len(wins))
    finally:
        model.train(training)
    return found


def round_callback(
    stream: RoundStream,
    held_out: Mapping[str, Sequence[Pair]],
    collator: PairCollator,
    *,
    eta: float,
    rounds: int,
    say: Callable[[Mapping[str, Any]], object],
) -> TrainerCallback:
    """Return the callback that measures after each round and sets the weights of the next one."""
    from transformers import TrainerCallback

    class RoundCallback(TrainerCallback):
        def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
            ended = state.global_step // stream.steps
            if state.global_step % stream.steps or ended >= rounds or ended < len(stream.weights):
                return
            found = processes.broadcast_object(accuracies(model, held_out, collator))
            weights = hybrid_weights(stream.weights[-1], found, eta=eta)
            stream.weights.append(weights)
            names = list(stream.pairs)
            told = {name: {"accuracy": a, "weight": w} for name, a, w in zip(names, found, weights)}
            say({"round": ended, "step": state.global_step, "dimensions": told})

    return RoundCallback()


def weights_of(stream: RoundStream) -> Tensor:
    """Return the weights of all rounds so far as a tensor that a checkpoint holds."""
    return torch.tensor(stream.weights, dtype=torch.float64)
