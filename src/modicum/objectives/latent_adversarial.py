r"""Targeted latent adversarial training: refuse although the hidden states of the prompt are shifted for the worst.

The adversary looks for the shift under which the model gives the harmful answer; the model learns to refuse under it.
The search takes the steps of :func:`~modicum.objectives.circuit_breakers.lat_inner_step`, and both sides use the loss
here, with the answers exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from modicum.errors import RecipeError
from modicum.registry import objective
from modicum.types import IGNORED, NonNegative, NonNegativeInt, Positive, PositiveInt

FLOOR = -5.0  # log-probability below which a token is away far enough


@dataclass(frozen=True)
class Adversary:
    """How the worst shift is searched for.

    Args:
        eps: Longest shift of one token's state.
        inner_lr: Rate of the search, by AdamW.
        inner_steps: Steps of the search for each batch.
        layers: Places that are shifted: 0 is the embedding, k the output of the k-th block. The embedding and each
            quarter of the depth when not given, as published for 32 blocks.
    """

    eps: Positive = 6.0
    inner_lr: Positive = 1e-3
    inner_steps: PositiveInt = 16
    layers: tuple[NonNegativeInt, ...] | None = None


@objective("latent_adversarial", paper="arXiv:2407.15549", acts_on="contrasts", gather=Adversary)
def latent_adversarial(
    toward_logits: Float[Tensor, "b t v"],
    toward: Int[Tensor, "b t"],
    away_logits: Float[Tensor, "b u v"],
    away: Int[Tensor, "b u"],
    divergence: Float[Tensor, ""] | None = None,
    *,
    toward_weight: NonNegative = 0.5,
    away_weight: NonNegative = 0.5,
    keep_weight: NonNegative = 0.1,
) -> Float[Tensor, ""]:
    r"""Return the loss of giving one answer and not the other, and of staying as before on harmless requests.

    .. math::
        L = \tfrac{w_t}{|y|} \sum_{t} -\log p(y_t) + \tfrac{w_a}{|y'|} \sum_{t:\, \log p(y'_t) > -5} -\log(1 - p(y'_t))
            + w_k D

    Args:
        toward_logits: Logits where the wanted answer is predicted.
        toward: Its tokens; -100 elsewhere.
        away_logits: Logits where the unwanted answer is predicted.
        away: Its tokens; -100 elsewhere.
        divergence: :math:`D`: how far the model is from what it was on harmless requests.
        toward_weight: :math:`w_t`.
        away_weight: :math:`w_a`.
        keep_weight: :math:`w_k`.

    Returns:
        A scalar in float32.

    Raises:
        RecipeError: There is neither an answer nor a divergence.

    Example:
        >>> logits, answer, other = torch.zeros(1, 1, 2), torch.tensor([[0]]), torch.tensor([[1]])
        >>> latent_adversarial(logits, answer, logits, other)
        tensor(0.6931)

    Cost:
        A forward and a backward pass for each step of the search, and one more for the model.

    Deviates:
        A batch is attacked once for each step of the model; the published code takes four steps for each attack. Its
        divergence compares shifted positions; here each position is compared with itself.

    Reference:
        A. Sheshadri et al., "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs",
        2024, arXiv:2407.15549, section 3.
    """
    parts = []
    if bool((toward != IGNORED).any()):
        parts.append(toward_weight * cross_entropy(toward_logits.flatten(0, 1).float(), toward.flatten()))
    if bool((away != IGNORED).any()):
        known = away != IGNORED
        logp = away_logits.float().log_softmax(-1).gather(-1, away.clamp_min(0)[..., None])[..., 0]
        # log(1 - p) by expm1: near p = 1, where it counts, 1 - p would have no digits left.
        missed = -torch.log((-torch.expm1(logp)).clamp_min(torch.finfo(logp.dtype).tiny))
        parts.append(away_weight * torch.where(known & (logp > FLOOR), missed, 0.0).sum() / known.sum())
    if divergence is not None:
        parts.append(keep_weight * divergence)
    if not parts:
        raise RecipeError("A batch has no answer to learn from. Give rows with a completion, or larger batches.")
    return torch.stack(parts).sum()
