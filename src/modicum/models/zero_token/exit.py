"""When a sequence or a token leaves the loop: scores, who they are averaged over, and the decision."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from modicum.errors import RecipeError, did_you_mean
from modicum.models.zero_token.config import ExitScope, ExitScore
from modicum.random import generator


def exit_decision(
    p0s: Sequence[Float[Tensor, "b h t"]],
    *,
    threshold: float,
    score: ExitScore = "cycle_mean",
    scope: ExitScope = "sequence",
    mask: Bool[Tensor, "b t"] | None = None,
) -> Bool[Tensor, "b t"]:
    """Return which tokens stay in the loop.

    Args:
        p0s: Attention on the zero token in each layer of the cycle that has one.
        threshold: A token whose score is above it leaves.
        score: How the layers' values become one.
        scope: Whose score counts; see :func:`spread`.
        mask: Real tokens.

    Returns:
        True where a token goes on.

    Example:
        >>> p0 = torch.tensor([[[0.1, 0.7]]])
        >>> exit_decision([p0], threshold=0.5, scope="token")
        tensor([[ True, False]])
        >>> exit_decision([p0], threshold=0.5)
        tensor([[True, True]])
    """
    return ~(spread(layer_score(p0s, score=score), scope=scope, mask=mask) > threshold)


def layer_score(p0s: Sequence[Float[Tensor, "b h t"]], *, score: ExitScore = "cycle_mean") -> Float[Tensor, "b t"]:
    """Reduce the zero attention of a cycle's layers to one number for each token; heads are averaged."""
    per_layer = torch.stack([p0.mean(1) for p0 in p0s])
    if score == "cycle_mean":
        return per_layer.mean(0)
    if score == "cycle_max":
        return per_layer.amax(0)
    if score == "first_layer":
        return per_layer[0]
    if score in ("last_layer", "layer"):
        return per_layer[-1]
    raise RecipeError(f"There is no exit_score {score!r}. {did_you_mean(score, ExitScore.__args__)}")  # type: ignore[attr-defined]


def spread(
    score: Float[Tensor, "b t"],
    *,
    scope: ExitScope,
    mask: Bool[Tensor, "b t"] | None = None,
    positions: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t"]:
    """Average ``score`` over the tokens that decide together.

    ``sequence`` averages the real tokens of each sequence, ``last_token`` takes the last real one, ``prefix`` averages
    up to each token, ``token`` leaves every token to itself, ``batch`` averages everything. Scores that are NaN, of
    tokens that did not run, do not count. Where ``positions`` do not go on, another text begins in a packed row, which
    ``prefix`` averages by itself.
    """
    counts = ~score.isnan() if mask is None else mask & ~score.isnan()
    kept = score.masked_fill(~counts, 0.0)
    if scope == "token":
        return score
    if scope == "prefix":
        sums, ran = kept.cumsum(-1), counts.cumsum(-1)
        if positions is not None:
            place = torch.arange(score.shape[-1], device=score.device)
            begins = F.pad(positions.expand_as(score).diff(dim=-1) != 1, (1, 0), value=True)
            first = (place * begins).cummax(-1).values
            sums, ran = (x - x.gather(-1, first) + y.gather(-1, first) for x, y in ((sums, kept), (ran, counts.long())))
        return sums / ran.clamp(min=1)
    if scope == "sequence":
        mean = kept.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp(min=1)
    elif scope == "last_token":
        place = torch.arange(score.shape[-1], device=score.device) * counts
        mean = kept.gather(-1, place.argmax(-1, keepdim=True))
    elif scope == "batch":
        mean = (kept.sum() / counts.sum().clamp(min=1))[None, None]
    else:
        raise RecipeError(f"There is no exit_scope {scope!r}. {did_you_mean(scope, ExitScope.__args__)}")
    return mean.expand_as(score)


def latent_change(before: Float[Tensor, "b t d"], after: Float[Tensor, "b t d"]) -> Float[Tensor, "b t"]:
    """Return by how much a cycle changed the state, relative to its length."""
    wide = after.to(torch.promote_types(after.dtype, torch.float32))
    return (wide - before).norm(dim=-1) / wide.norm(dim=-1).clamp(min=torch.finfo(wide.dtype).tiny)


def confidence(logits: Float[Tensor, "b t v"]) -> Float[Tensor, "b t"]:
    """Return the probability of the likeliest next token."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.exp(wide.amax(-1) - wide.logsumexp(-1))


def gate_score(states: Float[Tensor, "b t d"], gate: Float[Tensor, " d+1"]) -> Float[Tensor, "b t"]:
    """Return the chance, by a gate's weights and bias, that further cycles change no prediction."""
    return torch.sigmoid(unit(states) @ gate[:-1].to(torch.float32) + gate[-1])


def unit(states: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
    """Return the states in float32, each with mean square 1."""
    wide = states.to(torch.float32)
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny))


def entropy_change(before: Float[Tensor, "b t v"], after: Float[Tensor, "b t v"]) -> Float[Tensor, "b t"]:
    """Return by how much a cycle changed the entropy of the prediction, in nats."""
    return (_entropy(after) - _entropy(before)).abs()


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def prediction_change(before: Float[Tensor, "b t v"], after: Float[Tensor, "b t v"]) -> Float[Tensor, "b t"]:
    """Return the Kullback-Leibler divergence from the prediction after the cycle to the one before, in nats."""
    wide = torch.promote_types(after.dtype, torch.float32)
    log_p, log_q = before.to(wide).log_softmax(-1), after.to(wide).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def random_score(positions: Tensor, *, seed: int, cycle: int) -> Tensor:
    """Return a uniform number for each position, the same whenever and in whatever batch the token is seen."""
    length = 1 << max(10, int(positions.max()).bit_length())
    return _draws(seed, cycle, length).to(positions.device)[positions]


@lru_cache(maxsize=64)
def _draws(seed: int, cycle: int, length: int) -> Tensor:
    # Blocks of one size keep the first draws the same when more are needed.
    blocks = [torch.rand(1024, generator=generator(seed, "random_exit", cycle, i)) for i in range(length // 1024)]
    return torch.cat(blocks)
