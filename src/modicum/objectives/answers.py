"""Objectives over answers rather than tokens: label words, multiple choice, and rewards that have no gradient.

They are the losses on which zeroth-order fine-tuning is compared; the first two can be differentiated as well. The
seam that makes their inputs from a model is :mod:`modicum.jobs.training.answers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from modicum.registry import objective
from modicum.types import IGNORED, PositiveInt

Metric: TypeAlias = Literal["own", "exact_match", "f1"]


@objective("label_words", paper="arXiv:2305.17333", acts_on="answers", answers="words")
def label_words(scores: Float[Tensor, "b c"], answers: Int[Tensor, " b"]) -> Float[Tensor, ""]:
    r"""Return the cross-entropy over the label words' logits alone, for candidates of one token.

    .. math::
        L = -\frac1b \sum_i \log \frac{e^{z_{i,w(a_i)}}}{\sum_{w \in \text{words}} e^{z_{i,w}}}

    It equals the cross-entropy over the candidates' log-likelihoods: the normalizer of the whole vocabulary cancels.

    Args:
        scores: Logits of the label words where each prompt ends.
        answers: Position of the right word.

    Returns:
        The mean loss.

    Example:
        >>> import torch
        >>> label_words(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))
        tensor(0.6931)

    Cost:
        One forward pass over the prompts, with logits at their last position only.

    Reference:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333,
        appendix E.
    """
    return functional.cross_entropy(scores.float(), answers)


@objective("multiple_choice", paper="arXiv:2305.17333", acts_on="answers", right_alone={"learn": "likelihood"})
def multiple_choice(
    scores: Float[Tensor, "b c"], answers: Int[Tensor, " b"], *, learn: Literal["choice", "likelihood"] = "choice"
) -> Float[Tensor, ""]:
    r"""Return the loss of choosing among candidates of any length by their mean log-likelihood.

    .. math::
        s_{ij} = \frac{1}{|c_{ij}|} \log p(c_{ij} \mid x_i), \qquad
        L_{choice} = -\frac1b \sum_i \log \frac{e^{s_{i,a_i}}}{\sum_j e^{s_{ij}}}, \qquad
        L_{likelihood} = -\frac1b \sum_i s_{i,a_i}

    Args:
        scores: Mean log-likelihood of each candidate, -inf where an example has fewer.
        answers: Position of the right candidate.
        learn: ``choice`` compares the candidates; ``likelihood`` trains on the right one alone, as the published suite
            does for COPA and ReCoRD, and compares in evaluation only.

    Returns:
        The mean loss.

    Example:
        >>> import torch
        >>> multiple_choice(torch.tensor([[-1.0, -1.0]]), torch.tensor([0]))
        tensor(0.6931)

    Cost:
        A forward pass over a row for each candidate (``likelihood``: in training one row), with logits where a
        candidate's tokens are predicted.

    Deviates:
        The published suite trains on the right candidate alone, which is ``likelihood``; ``choice``, the default, also
        trains against the others, as the suite compares them in evaluation.

    Reference:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333,
        appendix E.
    """
    if learn == "choice":
        return functional.cross_entropy(scores, answers)
    return -scores.gather(1, answers[:, None]).mean()


@dataclass(frozen=True)
class Answering:
    """How answers are generated and scored.

    Args:
        metric: ``own`` is the data's own score (F1 for SQuAD and DROP, reasoning-gym's rules) and exact match where it
            has none; or one of the two by name.
        max_new_tokens: Limit on an answer, which also ends at a line's end.
    """

    metric: Metric = "own"
    max_new_tokens: PositiveInt = 32


@objective(
    "reward", paper="arXiv:2305.17333", acts_on="answers", answers="generated", gather=Answering, differentiable=False
)
def reward(rewards: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    r"""Return minus the mean reward of generated answers, for zeroth-order optimizers only.

    .. math::
        L = -\frac1b \sum_i r(\hat y_i, y_i), \qquad \hat y_i = \text{greedy answer to } x_i

    Args:
        rewards: Score of each answer, in [0, 1].

    Returns:
        The loss.

    Example:
        >>> import torch
        >>> reward(torch.tensor([1.0, 0.0]))
        tensor(-0.5000)

    Cost:
        A generation for each probe; nothing is kept for a backward pass.

    Deviates:
        Generation is greedy, so that both points of a probe meet the same chance: none.

    Reference:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333,
        section 3.3.
    """
    return -rewards.float().mean()


def candidate_scores(logits: Float[Tensor, "r p v"], targets: Int[Tensor, "r p"]) -> Float[Tensor, " r"]:
    """Return the mean log-likelihood of each row's targets.

    Args:
        logits: Logits at the positions that predict.
        targets: The token that each position is to predict; -100 where a row has none.

    Example:
        >>> import torch
        >>> candidate_scores(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).exp()
        tensor([0.2500])
    """
    mine = targets != IGNORED
    taken = logits.float().log_softmax(-1).gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (taken * mine).sum(1) / mine.sum(1).clamp_min(1)
