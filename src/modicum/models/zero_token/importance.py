"""Which visits of a looped model matter: what the zero token says, and what skipping each of them costs."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from modicum.errors import RecipeError
from modicum.evaluate.dimensions import rank_correlation
from modicum.models.zero_token.body import Call
from modicum.models.zero_token.model import ZeroTokenForCausalLM
from modicum.models.zero_token.schedule import VisitId
from modicum.types import PositiveInt


@dataclass(frozen=True)
class VisitImportance:
    """What a visit does to the prediction.

    Attributes:
        layer: Physical layer.
        cycle: Cycle.
        zero_attention: Mean attention on the zero token; None where the visit has none.
        loss_increase: By how much the cross-entropy rises when the visit is skipped, in nats; below 0 where it falls.
    """

    layer: int
    cycle: int
    zero_attention: float | None
    loss_increase: float


@dataclass(frozen=True)
class Importance:
    """All visits of the loop.

    Attributes:
        visits: One for each visit of a looped layer, in the order in which they run.
        loss: Cross-entropy with all of them.
        rank_correlation: Spearman's, of the attention on the zero token with the rise of the loss. The published
            reading (much attention on it, little need of the layer) says that it is below 0. None where one of the two
            is constant.
    """

    visits: tuple[VisitImportance, ...]
    loss: float
    rank_correlation: float | None

    def least(self, count: PositiveInt, *, by: Literal["loss", "zero_attention"] = "loss") -> list[VisitId]:
        """Return the ``count`` visits that matter least: by the measured loss, or by what the zero token says.

        Cycle 0 of a layer, and the last visit that is left of a cycle, stay.

        Raises:
            RecipeError: There are not so many, or no zero tokens to go by.
        """
        if by == "zero_attention" and any(visit.zero_attention is None for visit in self.visits):
            raise RecipeError("Some visits have no zero token to go by. Choose by loss.")
        order = sorted(self.visits, key=lambda v: v.loss_increase if by == "loss" else -(v.zero_attention or 0.0))
        check_count([(visit.layer, visit.cycle) for visit in self.visits], count)
        left = _left(visit.cycle for visit in self.visits)
        chosen: list[VisitId] = []
        for visit in order:
            if len(chosen) < count and visit.cycle and left[visit.cycle] > 1:
                left[visit.cycle] -= 1
                chosen.append((visit.layer, visit.cycle))
        return sorted(chosen, key=lambda visit: (visit[1], visit[0]))


def _left(cycles: Iterable[int]) -> dict[int, int]:
    """Return how many visits each cycle has."""
    return dict(Counter(cycles))


def looped(model: ZeroTokenForCausalLM) -> list[VisitId]:
    """Return the visits of the loop, in the order in which they run."""
    return [visit for visit in model.schedule if visit[0] in model.config.middle]


def check_count(visits: Sequence[VisitId], count: int) -> None:
    """Refuse to skip more visits than can be: those of cycle 0 stay, and one of every other cycle.

    Raises:
        RecipeError: There are not so many.
    """
    most = sum(number - 1 for cycle, number in _left(cycle for _, cycle in visits).items() if cycle)
    if count > most:
        raise RecipeError(f"{count} visits were to be skipped, but only {most} can be. Ask for fewer.")


@torch.no_grad()
def visit_importance(model: ZeroTokenForCausalLM, batches: Iterable[Int[Tensor, "b t"]]) -> Importance:
    """Measure the attention on each visit's zero token beside the loss when this visit alone is skipped.

    Args:
        model: A looped model.
        batches: Token ids of held-out text, without padding; they are read once for each visit.

    Raises:
        RecipeError: There are no batches.

    Cost:
        A pass over the text for each visit of the loop, and one more.
    """
    data = list(batches)
    if not data:
        raise RecipeError("visit_importance got no batches.")
    was_training = model.training
    model.eval()
    visits = looped(model)
    loss, zero = _measured(model, data, frozenset())
    found = tuple(
        VisitImportance(*visit, zero.get(visit), _measured(model, data, frozenset({visit}))[0] - loss)
        for visit in visits
    )
    model.train(was_training)
    pairs = [(visit.zero_attention, visit.loss_increase) for visit in found if visit.zero_attention is not None]
    scores = [list(column) for column in zip(*pairs)]
    return Importance(found, loss, rank_correlation(*scores) if len(pairs) > 2 else None)


def _measured(
    model: ZeroTokenForCausalLM, data: Sequence[Tensor], skip: frozenset[VisitId]
) -> tuple[float, dict[VisitId, float]]:
    loss, targets, zero, tokens = 0.0, 0, dict.fromkeys(model._rows, 0.0), 0
    for ids in data:
        call = Call(skip=skip, stay=True)
        count = ids[:, 1:].numel()
        loss += float(model(ids, labels=ids, use_cache=False, looping=call).loss) * count
        targets, tokens = targets + count, tokens + ids.numel()
        if not skip:
            for visit in call.trace.visits:
                if visit.p0 is not None:
                    zero[visit.layer, visit.cycle] += float(visit.p0.mean()) * ids.numel()
    return loss / targets, {visit: value / tokens for visit, value in zero.items()}


def skip_visits(model: ZeroTokenForCausalLM, skip: Sequence[VisitId]) -> ZeroTokenForCausalLM:
    """Return the model without some of its visits; it has the same parameters and fewer slots in its cache.

    Args:
        model: A looped model; it is left as it is.
        skip: Visits as (layer, cycle), such as :meth:`Importance.least` returns.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from modicum.models import convert_to_zero_token
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=4, num_attention_heads=2))
        >>> skip_visits(convert_to_zero_token(base), [(2, 1)]).config.schedule
        [(0, 0), (1, 0), (2, 0), (1, 1), (3, 0)]
    """
    pruned = copy.deepcopy(model)
    pruned.config.skip = [list(visit) for visit in {*map(tuple, model.config.skip or ()), *map(tuple, skip)}]
    pruned.config.check()
    pruned.follow_schedule()
    return pruned
