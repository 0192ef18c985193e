"""Batches of several LoRA experts: beside the dense weights, or one expert after the other, whichever costs less."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from modicum.errors import RecipeError, did_you_mean
from modicum.models.routed.requests import Groups

Way: TypeAlias = Literal["measured", "beside", "grouped"]
Shape: TypeAlias = tuple[int, int, int]  # rows and tokens as powers of two, and the groups of a batch


class Cost(NamedTuple):
    """Seconds of one way to answer a batch.

    Attributes:
        start: Writing of mixtures, and the prompt.
        step: One more token of every row.
    """

    start: float
    step: float

    def of(self, tokens: int) -> float:
        """Return the cost of an answer."""
        return self.start + tokens * self.step


class Mixed:
    """Chooses how a batch of several experts is run, by what both ways cost on the first batch of its shape.

    Beside the dense weights all rows run together and every module takes two thin products more; grouped, each expert
    is written into the weights and its rows run alone. Which is faster depends on the machine, the rows of each expert
    and the length of the answer. Both give the same numbers but for rounding; which of them runs may differ from one
    machine or process to the next, so :attr:`way` fixes it where the last bits must not.

    Attributes:
        costs: What was measured: beside and grouped, by shape.
    """

    def __init__(self) -> None:
        self.costs: dict[Shape, tuple[Cost, Cost]] = {}
        self._way: Way = "measured"

    @property
    def way(self) -> Way:
        """``measured`` takes the faster one; ``beside`` and ``grouped`` are always themselves."""
        return self._way

    @way.setter
    def way(self, way: Way) -> None:
        if way not in get_args(Way):
            raise RecipeError(f"way {way!r} is not known. {did_you_mean(str(way), get_args(Way))}")
        self._way = way

    def beside(self, model: Any, ids: Tensor, rows: Tensor, groups: Groups, *, tokens: int = 0, each: int = 1) -> bool:
        """Return whether a batch is run beside the dense weights.

        Args:
            model: With a side path.
            ids: Prompts ``(n, t)``.
            rows: Weights of the experts ``(n, T)``.
            groups: Weights of the experts that occur, with the numbers of their rows.
            tokens: Of an answer, at most.
            each: Rows that a prompt has: beams, or samples.
        """
        if self._way != "measured":
            return self._way == "beside"
        shape = (len(ids) * each).bit_length(), ids.shape[1].bit_length(), len(groups)
        if shape not in self.costs:
            self.costs[shape] = _measured(model, ids, rows, groups, each)
        beside, grouped = self.costs[shape]
        return beside.of(tokens) <= grouped.of(tokens)


@torch.no_grad()
def _measured(model: Any, ids: Tensor, rows: Tensor, groups: Groups, each: int) -> tuple[Cost, Cost]:
    def run(some: Tensor) -> Callable[[], Any]:
        return lambda: model.host(input_ids=some, use_cache=False, logits_to_keep=1)

    def cost(prompts: Tensor) -> tuple[float, float]:
        some = prompts.repeat_interleave(each, 0)
        step = _seconds(run(some[:, -1:]), turns=3)  # what is prepared at the first call is no part of it
        return _seconds(run(some)), step

    grouped = []
    model.working.dense()  # no group finds its mixture written already
    for weights, numbers in groups.items():
        written = _seconds(lambda weights=weights: model.materialise(weights))  # type: ignore[misc]
        start, step = cost(ids[numbers])
        grouped.append((written + start, step))
    dense = _seconds(model.working.dense)
    with model.side(rows):
        start, step = cost(ids)
    return Cost(dense + start, step), Cost(*map(sum, zip(*grouped)))


def _seconds(run: Callable[[], Any], *, turns: int = 1) -> float:
    """Return the least time of a call."""
    accelerator = torch.accelerator.is_available()
    found = []
    for _ in range(turns):
        began = time.perf_counter()
        run()
        if accelerator:
            torch.accelerator.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
