r"""Direct preference optimisation: learn from pairs of answers, of which one is the better.

The reference is the model from which training starts. Its log-probabilities of the pairs do not change, so they are
data here; the seam that computes them once, and those of the model in training, is
:mod:`modicum.jobs.training.preferences`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from modicum.errors import RecipeError
from modicum.registry import objective
from modicum.types import NonNegative, Positive

Variant: TypeAlias = Literal["sigmoid", "ipo", "hinge"]
Smoothing: TypeAlias = Annotated[float, Ge(0), Lt(0.5)]
Counts: TypeAlias = Tensor | int | None


@objective("dpo", paper="arXiv:2305.18290", acts_on="pairs")
def dpo_loss(
    policy_chosen: Float[Tensor, " b"],
    policy_rejected: Float[Tensor, " b"],
    reference_chosen: Float[Tensor, " b"],
    reference_rejected: Float[Tensor, " b"],
    chosen_tokens: Counts = None,
    rejected_tokens: Counts = None,
    *,
    beta: Positive = 0.1,
    variant: Variant = "sigmoid",
    label_smoothing: Smoothing = 0.0,
    length_normalised: bool = False,
    sft_weight: NonNegative = 0.0,
) -> Float[Tensor, ""]:
    r"""Return the loss of preferring the chosen answers more than the reference does.

    .. math::
        m &= \beta\,[(\log \pi(y_w) - \log \pi_0(y_w)) - (\log \pi(y_l) - \log \pi_0(y_l))] \\
        L &= (1-\epsilon)\,\ell(m) + \epsilon\,\ell(-m) - \gamma \tfrac{1}{|y_w|} \log \pi(y_w)

    with :math:`\ell(m) = -\log\sigma(m)` (``sigmoid``), :math:`(m/\beta - 1/(2\beta))^2` (``ipo``) or
    :math:`\max(0, 1 - m)` (``hinge``).

    Args:
        policy_chosen: Log-probabilities of the chosen answers under the model, summed over their tokens.
        policy_rejected: Those of the rejected answers.
        reference_chosen: Log-probabilities of the chosen answers under the reference.
        reference_rejected: Those of the rejected answers.
        chosen_tokens: Tokens of the chosen answers, for ``length_normalised`` and ``sft_weight``.
        rejected_tokens: Tokens of the rejected answers, for ``length_normalised``.
        beta: :math:`\beta`: how much it costs to leave the reference.
        variant: :math:`\ell`.
        label_smoothing: :math:`\epsilon`: share of pairs whose label is taken to be wrong, below one half.
        length_normalised: Take means over the tokens in place of the sums.
        sft_weight: :math:`\gamma`: weight of learning the chosen answer itself, whose likelihood else may fall.

    Returns:
        The mean over the pairs, in float32 (float64 for float64).

    Raises:
        RecipeError: A knob is out of range, there is no pair, the vectors differ in length, or counts that a knob needs
            are missing or 0.

    Example:
        >>> pair = [torch.tensor([x]) for x in (-10.0, -9.0, -12.0, -8.0)]
        >>> dpo_loss(*pair), dpo_loss(*pair, variant="ipo")
        (tensor(0.5544), tensor(4.))

    Cost:
        Elementwise over the pairs. The log-probabilities cost a forward and a backward pass over each pair, and one
        forward pass of the reference, once.

    Deviates:
        ``label_smoothing`` serves every variant. ``sft_weight`` and ``length_normalised`` were added by others later.

    Reference:
        Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023,
        arXiv:2305.18290, eq. 7; ``ipo``: Azar et al., 2023, arXiv:2310.12036, eq. 17; ``hinge``: Zhao et al., 2023,
        arXiv:2305.10425; ``label_smoothing``: Mitchell, 2023, "A note on DPO with noisy preferences".
    """
    sums = [_wide(part) for part in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)]
    if len({part.shape for part in sums}) > 1:
        raise RecipeError(
            f"The log-probabilities have the shapes {', '.join(str(tuple(part.shape)) for part in sums)}, expected one "
            "number for each pair in all four."
        )
    won, lost, won_before, lost_before = sums
    if not won.numel():
        raise RecipeError("There is no pair, expected at least one: the mean over none is no loss.")
    chosen = _counts(chosen_tokens, won, "chosen_tokens", needed=length_normalised or sft_weight > 0)
    rejected = _counts(rejected_tokens, lost, "rejected_tokens", needed=length_normalised)
    gained, shifted = won - won_before, lost - lost_before
    if length_normalised:
        gained, shifted = gained / chosen, shifted / rejected
    margin = beta * (gained - shifted)
    loss = (1 - label_smoothing) * _loss(margin, variant, beta)
    if label_smoothing:
        loss = loss + label_smoothing * _loss(-margin, variant, beta)
    if sft_weight:
        loss = loss - sft_weight * won / chosen
    return loss.mean()


def _loss(margin: Tensor, variant: Variant, beta: float) -> Tensor:
    if variant == "ipo":
        return (margin / beta - 1 / (2 * beta)).square()
    return (1 - margin).clamp_min(0) if variant == "hinge" else -functional.logsigmoid(margin)


def _wide(values: Tensor) -> Tensor:
    given = torch.as_tensor(values)
    return given.to(torch.promote_types(given.dtype, torch.float32))


def _counts(given: Counts, like: Tensor, name: str, *, needed: bool) -> Tensor:
    if not needed:
        return like.new_ones(())
    if given is None:
        raise RecipeError(f"{name} is missing; length_normalised and sft_weight divide by the tokens of an answer.")
    counts = torch.as_tensor(given, device=like.device).to(like.dtype)
    if counts.ndim and counts.shape != like.shape:
        raise RecipeError(
            f"{name} has the shape {tuple(counts.shape)}, expected one number for each of {len(like)} pairs."
        )
    if bool((counts < 1).any()):
        raise RecipeError(f"{name} holds {counts.min().item():g}, expected at least one token for each answer.")
    return counts
