"""Pick the exit threshold on held-out text, for a loss that may rise by so much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from modicum.errors import RecipeError
from modicum.evaluate.logistic import fit
from modicum.knobs import guarded
from modicum.models.zero_token.body import Call
from modicum.models.zero_token.exit import unit
from modicum.models.zero_token.model import ZeroTokenForCausalLM
from modicum.models.zero_token.spent import counted
from modicum.types import NonNegative, Positive, PositiveInt

# Thresholds that nobody passes: p0 and a probability are not above 1, a change is not below 0, and no draw is above 1.
_NEVER = {
    "zero_attention": 1.0, "confidence": 1.0, "gate": 1.0, "latent": 0.0, "entropy": 0.0, "kl": 0.0, "random": 0.0
}  # fmt: skip
_RISING = ("zero_attention", "confidence", "gate")  # a token leaves above the threshold, not below it


@dataclass(frozen=True)
class ExitPoint:
    """A threshold and what it costs.

    Attributes:
        threshold: The threshold; the one that nobody reaches when every other costs too much.
        mean_cycles: Cycles that a token runs on average.
        loss: Cross-entropy at this threshold.
        full_loss: Cross-entropy with all cycles.
        visits: Layer visits of a token on average, those by which the criterion decides among them.
    """

    threshold: float
    mean_cycles: float
    loss: float
    full_loss: float
    visits: float

    def __iter__(self) -> Iterator[float]:
        """Yield threshold, mean cycles and loss."""
        return iter((self.threshold, self.mean_cycles, self.loss))


@guarded
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
    return min(allowed, key=lambda point: (point.mean_cycles, point.loss))


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
    full_loss, cycles, scores, _ = _measure(model, data, never)
    curve = [ExitPoint(never, cycles, full_loss, full_loss, float(len(model.schedule)))]  # nothing is to be decided
    seen = scores[scores.isfinite()].sort().values
    # Entropy and prediction are compared with those after the cycle before: of two cycles there is nothing to compare.
    for share in torch.linspace(1, 0, candidates + 1)[1:] if len(seen) else ():
        # A score is compared strictly: just below a quantile, all tokens at or above it leave.
        threshold = float(torch.nextafter(seen[int(share * (len(seen) - 1))], torch.tensor(-torch.inf)))
        threshold = threshold if criterion in _RISING else 1 - threshold if criterion == "random" else -threshold
        loss, mean_cycles, _, visits = _measure(model, data, threshold)
        curve.append(ExitPoint(threshold, mean_cycles, loss, full_loss, visits))
    model.train(was_training)
    return curve


@torch.no_grad()
def loss_by_cycles(model: ZeroTokenForCausalLM, batches: Iterable[Int[Tensor, "b t"]]) -> list[float]:
    """Return the mean cross-entropy when every token runs 1, 2, … all cycles."""
    data, depth = list(batches), model.config.depth
    return [_measure(model, data, None, n_cycles=cycles)[0] for cycles in range(1, depth + 1)]


def _measure(
    model: ZeroTokenForCausalLM, data: list[Tensor], threshold: float | None, n_cycles: int | None = None
) -> tuple[float, float, Tensor, float]:
    loss = cycles = visits = 0.0
    scores, targets, tokens = [torch.empty(0)], 0, 0
    for input_ids in data:
        with counted() as spent:
            out = model(input_ids, labels=input_ids, use_cache=False, exit_threshold=threshold, n_cycles=n_cycles)
        count = input_ids[:, 1:].numel()
        loss += float(out.loss) * count
        cycles += float(out.cycles.sum())
        targets, tokens = targets + count, tokens + input_ids.numel()
        visits += spent.visits
        scores += [score.flatten().float() for score in out.exit_scores or ()]
    return loss / targets, cycles / tokens, torch.cat(scores), visits / tokens


@guarded
@torch.no_grad()
def fit_exit_gate(
    model: ZeroTokenForCausalLM, batches: Iterable[Int[Tensor, "b t"]], *, l2: Positive = 1.0
) -> dict[int, float]:
    r"""Add a gate to a trained model and fit it: does the prediction after this cycle stay what it is?

    .. math:: g_c(h) = \sigma\bigl(w_c^\top h / \mathrm{rms}(h) + b_c\bigr)

    A linear probe for each cycle but the last, on the state after it; its label is whether the likeliest token after
    the cycle is the one after all cycles. The rest of the model is left as it is. Leave by it with
    ``exit_criterion="gate"``, at a threshold from :func:`calibrate_threshold` on other text.

    Args:
        model: A looped model; it gets the gate.
        batches: Token ids without padding; fit on other text than the threshold is chosen on.
        l2: Penalty on the weights.

    Returns:
        For each cycle, counted from 1, the share of tokens whose prediction stays.

    Raises:
        RecipeError: There are no batches, or the model has a single cycle.

    Reference:
        Zhu et al., "Scaling Latent Reasoning via Looped Language Models", 2025, arXiv:2510.25741, for a linear gate on
        the state; it is trained there with the model, here after it.
    """
    data, depth = list(batches), model.config.depth
    if not data or depth < 2 or len(model._stages.cycles) < depth:
        raise RecipeError(
            f"A gate was to be fitted on {len(data)} batches with {depth} cycles, expected 1 and 2 or more."
        )
    was_training = model.training
    model.eval()
    states: list[list[Tensor]] = [[] for _ in range(depth - 1)]
    labels: list[list[Tensor]] = [[] for _ in range(depth - 1)]
    for ids in data:
        call = Call(stay=True)
        last = model(ids, use_cache=False, looping=call).logits.argmax(-1)
        for cycle in range(depth - 1):
            now = model(ids, use_cache=False, n_cycles=cycle + 1).logits.argmax(-1)
            states[cycle].append(unit(call.trace.cycle_states[cycle]).flatten(0, 1))
            labels[cycle].append((now == last).flatten())
    model.config.exit_gate = True
    gate = model.zero_token.add_gate(depth - 1, model.config.hidden_size)
    stays = {}
    for cycle in range(depth - 1):
        stay = torch.cat(labels[cycle])
        stays[cycle + 1] = float(stay.float().mean())
        gate[cycle] = 0
        if bool(stay.all()) or not bool(stay.any()):
            gate[cycle, -1] = 20.0 if bool(stay.any()) else -20.0  # nothing to tell apart
            continue
        probe = fit(torch.cat(states[cycle]), stay, l2=l2)
        gate[cycle, :-1], gate[cycle, -1] = probe.weight.to(gate), probe.bias
    model.train(was_training)
    return stays
