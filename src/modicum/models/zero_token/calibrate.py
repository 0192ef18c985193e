"""Pick the exit threshold on held-out text, for a loss that may rise by so much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from modicum.errors import RecipeError
from modicum.models.zero_token.model import ZeroTokenForCausalLM
from modicum.types import NonNegative, PositiveInt

# Thresholds that nobody passes: p0 and a probability are not above 1, a change is not below 0, and no draw is above 1.
_NEVER = {"zero_attention": 1.0, "confidence": 1.0, "latent": 0.0, "entropy": 0.0, "kl": 0.0, "random": 0.0}


@dataclass(frozen=True)
class ExitPoint:
    """A threshold and what it costs.

    Attributes:
        threshold: The threshold; the one that nobody reaches when every other costs too much.
        mean_cycles: Cycles that a token runs on average.
        loss: Cross-entropy at this threshold.
        full_loss: Cross-entropy with all cycles.
    """

    threshold: float
    mean_cycles: float
    loss: float
    full_loss: float


def calibrate_threshold(
    model: ZeroTokenForCausalLM,
    batches: Iterable[Int[Tensor, "b t"]],
    *,
    max_loss_increase: NonNegative = 0.01,
    candidates: PositiveInt = 16,
) -> ExitPoint:
    """Return the threshold that runs the fewest cycles while the loss rises by at most ``max_loss_increase``.

    One threshold does not fit all lengths: the attention on the zero token falls with the number of keys. Calibrate on
    text as long as what the model will read, with the exit scope that it will use. Under the scope ``sequence`` a
    token's depth depends on what follows it, so that the loss is no perplexity; ``token`` and ``prefix`` are causal.

    Args:
        model: A model, with its exit criterion, score and scope.
        batches: Token ids without padding; they are read several times.
        max_loss_increase: Allowed rise of the mean cross-entropy, in nats.
        candidates: How many quantiles of the scores are tried.

    Raises:
        RecipeError: There are no batches, or the model has a single cycle.
    """
    return cheapest(exit_curve(model, batches, candidates=candidates), max_loss_increase=max_loss_increase)


def cheapest(curve: Sequence[ExitPoint], *, max_loss_increase: NonNegative) -> ExitPoint:
    """Return the point of ``curve`` with the fewest cycles whose loss rises by at most ``max_loss_increase``."""
    allowed = [point for point in curve if point.loss <= point.full_loss + max_loss_increase]
    return min(allowed, key=lambda point: point.mean_cycles)


@torch.no_grad()
def exit_curve(
    model: ZeroTokenForCausalLM, batches: Iterable[Int[Tensor, "b t"]], *, candidates: PositiveInt = 16
) -> list[ExitPoint]:
    """Return the loss against the mean number of cycles, from the threshold that nobody reaches downwards.

    Args:
        model: A model, with its exit criterion, score and scope.
        batches: Token ids without padding.
        candidates: How many quantiles of the scores are tried.

    Raises:
        RecipeError: There are no batches, or the model has a single cycle.
    """
    data = list(batches)
    criterion = model.config.exit_criterion
    never = _NEVER[criterion]
    if not data or model.config.depth < 2:
        raise RecipeError(
            f"Exits were to be calibrated on {len(data)} batches with {model.config.depth} cycles. "
            "Give at least one batch and a model of two cycles."
        )
    was_training = model.training
    model.eval()
    full_loss, cycles, scores = _measure(model, data, never)
    curve = [ExitPoint(never, cycles, full_loss, full_loss)]
    seen = scores[scores.isfinite()].sort().values
    for share in torch.linspace(1, 0, candidates + 1)[1:]:
        # A score is compared strictly: just below a quantile, all tokens at or above it leave.
        threshold = float(torch.nextafter(seen[int(share * (len(seen) - 1))], torch.tensor(-torch.inf)))
        threshold = {"zero_attention": threshold, "confidence": threshold, "random": 1 - threshold}.get(
            criterion, -threshold
        )
        loss, mean_cycles, _ = _measure(model, data, threshold)
        curve.append(ExitPoint(threshold, mean_cycles, loss, full_loss))
    model.train(was_training)
    return curve


@torch.no_grad()
def loss_by_cycles(model: ZeroTokenForCausalLM, batches: Iterable[Int[Tensor, "b t"]]) -> list[float]:
    """Return the mean cross-entropy when every token runs 1, 2, … all cycles."""
    data, depth = list(batches), model.config.depth
    return [_measure(model, data, None, n_cycles=cycles)[0] for cycles in range(1, depth + 1)]


def _measure(
    model: ZeroTokenForCausalLM, data: list[Tensor], threshold: float | None, n_cycles: int | None = None
) -> tuple[float, float, Tensor]:
    loss = cycles = 0.0
    scores, targets, tokens = [torch.empty(0)], 0, 0
    for input_ids in data:
        out = model(input_ids, labels=input_ids, use_cache=False, exit_threshold=threshold, n_cycles=n_cycles)
        count = input_ids[:, 1:].numel()
        loss += float(out.loss) * count
        cycles += float(out.cycles.sum())
        targets, tokens = targets + count, tokens + input_ids.numel()
        scores += [score.flatten().float() for score in out.exit_scores or ()]
    return loss / targets, cycles / tokens, torch.cat(scores)
