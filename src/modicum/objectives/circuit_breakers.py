r"""Circuit breakers and targeted latent adversarial training: baselines of safety reasoning that change hidden states.

Circuit breakers turn the states of harmful answers away from where they were, and hold those of harmless ones. Latent
adversarial training looks for the worst small shift of the states and trains against it.

Reference:
    A. Zou et al., "Improving Alignment and Robustness with Circuit Breakers", 2024, arXiv:2406.04313; A. Sheshadri et
    al., "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs", 2024,
    arXiv:2407.15549.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from modicum.errors import RecipeError
from modicum.registry import objective
from modicum.types import Positive, PositiveInt


@dataclass(frozen=True)
class Rerouting:
    """Which states are turned away, and when.

    Args:
        layers: Blocks whose outputs are turned away, counted from 1; those at a third and two thirds of the depth when
            not given, as published for 32 blocks. States are kept up to the last of them.
        horizon: Steps after which nothing is turned away any more; twice the steps of the run when not given, so that
            the schedule stops half-way as the published one does.
    """

    layers: tuple[PositiveInt, ...] | None = None
    horizon: PositiveInt | None = None


@objective("circuit_breakers", paper="arXiv:2406.04313", acts_on="contrasts", supplied={"step"}, gather=Rerouting)
def circuit_breaker_loss(
    h: Tensor,
    h_ref: Tensor,
    retain_mask: Tensor,
    harmful_mask: Tensor,
    *,
    step: int,
    alpha: Positive = 10.0,
    horizon: PositiveInt = 300,
) -> Tensor:
    r"""Return the loss that keeps harmless states and reroutes harmful ones.

    .. math:: L = c_r \operatorname{mean}_{\mathrm{retain}} \lVert h - h_0 \rVert_2
              + c_b \operatorname{mean}_{\mathrm{harmful}} \max(0, \cos(h, h_0)), \qquad
              c_r = \alpha \tfrac{t}{T},\quad c_b = \alpha (1 - \tfrac{t}{T})

    Args:
        h: Hidden states, (…, tokens, d), of all layers that take part.
        h_ref: The same of the frozen model, which is this model with its adapter off. No gradient flows there.
        retain_mask: Tokens to keep, broadcastable to (…, tokens).
        harmful_mask: Tokens to reroute, likewise.
        step: Optimiser steps done, :math:`t`, from 0 to ``horizon``.
        alpha: Sum of both coefficients.
        horizon: :math:`T`, twice the steps of a run: the published schedule stops half-way.

    Returns:
        A scalar in float32.

    Raises:
        RecipeError: The step is out of range, the shapes differ, or no token is selected at all.

    Example:
        >>> h = torch.ones(1, 2, 4)
        >>> keep = torch.tensor([[True, False]])
        >>> circuit_breaker_loss(h, h, keep, ~keep, step=75).item()
        7.5

    Cost:
        Two reductions over the states.

    Deviates:
        The mean over kept tokens counts them alone; the published code divides by padded positions too, so its size
        depends on padding.

    Reference:
        A. Zou et al., 2024, arXiv:2406.04313, algorithm 1.
    """
    breaks, keeps = breaker_coefficients(step, alpha=alpha, horizon=horizon)
    if h.shape != h_ref.shape:
        raise RecipeError(f"h has the shape {tuple(h.shape)} and h_ref {tuple(h_ref.shape)}, expected the same states.")
    now, before = h.float(), h_ref.detach().float()
    retain, harmful = (mask.bool().expand(now.shape[:-1]) for mask in (retain_mask, harmful_mask))
    if not bool(retain.any() | harmful.any()):
        raise RecipeError("retain_mask and harmful_mask select no token, so there is nothing to learn.")
    loss = now.new_zeros(())
    if bool(retain.any()):
        # The norm's gradient at zero distance is taken as zero: every run starts there.
        squares = (now - before)[retain].square().sum(-1)
        distance = torch.where(squares > 0, squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt(), squares)
        loss = loss + keeps * distance.mean()
    if bool(harmful.any()):
        loss = loss + breaks * cosine_similarity(now[harmful], before[harmful], dim=-1).relu().mean()
    return loss


def breaker_coefficients(step: int, *, alpha: float = 10.0, horizon: int = 300) -> tuple[float, float]:
    """Return the coefficients of rerouting and of keeping after ``step`` steps; they add up to ``alpha``.

    Example:
        >>> [breaker_coefficients(step) for step in (0, 75, 150)]
        [(10.0, 0.0), (7.5, 2.5), (5.0, 5.0)]

    Raises:
        RecipeError: The step or a knob is out of range.

    Reference:
        A. Zou et al., 2024, arXiv:2406.04313, algorithm 1.
    """
    if horizon < 1 or not 0 <= step <= horizon or not alpha > 0:
        raise RecipeError(
            f"step is {step} with a horizon of {horizon} and alpha {alpha}, expected 0 to the horizon, which is 1 "
            "or more, and a positive number."
        )
    return alpha * (1 - step / horizon), alpha * step / horizon


def lat_inner_step(
    delta: Tensor, grad: Tensor, opt_state: dict[str, Any], *, eps: float = 6.0, lr: float = 1e-3
) -> tuple[Tensor, dict[str, Any]]:
    r"""Move an adversarial shift of hidden states one AdamW step down its loss, and back into its ball.

    After the step every token's shift is projected,
    :math:`\delta_t \leftarrow \delta_t \min(1, \epsilon / \lVert \delta_t \rVert_2)`.

    Args:
        delta: The shift, (…, tokens, d).
        grad: Gradient of the adversary's loss with respect to it.
        opt_state: What the last step returned; ``{}`` at first.
        eps: Longest shift of a token, above 0.
        lr: Rate of Adam with the usual moments (0.9, 0.999).

    Returns:
        The next shift, whose tokens are no longer than ``eps``, and the next state.

    Raises:
        RecipeError: ``eps`` or ``lr`` is not positive.

    Example:
        >>> delta, state = lat_inner_step(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]), {}, eps=0.5, lr=1.0)
        >>> delta.norm().item()
        0.5

    Reference:
        A. Sheshadri et al., 2024, arXiv:2407.15549, section 3.
    """
    if not eps > 0 or not lr > 0:
        raise RecipeError(f"eps is {eps} and lr is {lr}, expected positive numbers.")
    if delta.shape != grad.shape:
        raise RecipeError(f"delta has the shape {tuple(delta.shape)} and grad {tuple(grad.shape)}, expected the same.")
    count = opt_state.get("step", 0) + 1
    # Moments of 16 bits would underflow, and the step would divide nothing by nothing.
    at, slope = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (delta, grad))
    first = torch.lerp(opt_state.get("exp_avg", torch.zeros_like(at)), slope, 0.1)
    second = torch.lerp(opt_state.get("exp_avg_sq", torch.zeros_like(at)), slope * slope, 0.001)
    denominator = (second / (1 - 0.999**count)).sqrt() + 1e-8
    moved = (at - lr * (first / (1 - 0.9**count)) / denominator).double()
    lengths = moved.norm(dim=-1, keepdim=True)
    inside = torch.where(lengths > eps, moved * (eps / lengths.clamp_min(1e-300)), moved).to(delta.dtype)
    # The cast rounds: a token on the edge must not end a digit outside of it.
    over = (inside.double().norm(dim=-1, keepdim=True) > eps) | (inside.norm(dim=-1, keepdim=True) > eps)
    shrunk = (inside.double() * (1 - 4 * torch.finfo(delta.dtype).eps)).to(delta.dtype)
    return torch.where(over, shrunk, inside), {"step": count, "exp_avg": first, "exp_avg_sq": second}
