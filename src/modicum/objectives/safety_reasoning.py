r"""Losses and reward of safety reasoning: learn the reasoning and the answer, without the guidelines in the prompt.

The row is prompt, reasoning, answer; the guidelines that produced the reasoning are gone, so the ability has to become
the model's own (context distillation). :func:`completion_cross_entropy` is the hard form, :func:`topk_distillation_kl`
the soft one.

Reference:
    H. Wang, Z. Qin, L. Shen, X. Wang, D. Tao, M. Cheng, "Safety Reasoning with Guidelines", 2025, arXiv:2502.04040.
    The published text that could be consulted gives no equations: these follow its description, and the knobs are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from modicum.errors import RecipeError
from modicum.evaluate.chat import Judge, JudgeItem, split_reasoning
from modicum.registry import objective
from modicum.types import IGNORED, NonNegative, PositiveInt, UnitInterval

Norm: TypeAlias = Literal["token", "sequence"]


@dataclass(frozen=True)
class Distilling:
    """How rows of safety reasoning become tokens, and what the student learns from.

    Args:
        distill: ``hard`` learns the tokens of the rows; ``soft`` the teacher's likeliest tokens at each of them, the
            teacher having the guidelines in its prompt.
        top_k: Tokens of the teacher that are kept for each position.
        teacher: Folder or Hub id of a teacher with the same tokenizer, for ``soft``; the model itself, as it was before
            the training, when not given.
        guidelines: YAML file; the shipped guidelines when not given.
        guideline_set: Which kinds of them are used.
        guideline_keep_prob: Share of the rows whose prompt keeps the guidelines as its system message. 0 is context
            distillation; 1 is training without it, to be measured with the guidelines in the prompt.
        reasoning_format: How reasoning and answer are told apart.
    """

    distill: Literal["hard", "soft"] = "hard"
    top_k: PositiveInt = 64
    teacher: str | None = None
    guidelines: str | None = None
    guideline_set: Literal["none", "safety_only", "reasoning_only", "full"] = "full"
    guideline_keep_prob: UnitInterval = 0.0
    reasoning_format: Literal["think_tags", "headings", "plain"] = "think_tags"


@objective("safety_reasoning", paper="arXiv:2502.04040", acts_on="reasoning", gather=Distilling)
def safety_reasoning(
    logits: Float[Tensor, "b t v"],
    targets: Int[Tensor, "b t"],
    reasoning: Bool[Tensor, "b t"] | None = None,
    teacher_ids: Int[Tensor, "b t k"] | None = None,
    teacher_logprobs: Float[Tensor, "b t k"] | None = None,
    *,
    loss_norm: Norm = "token",
    reasoning_loss_weight: NonNegative = 1.0,
) -> Float[Tensor, ""]:
    r"""Return the loss of reasoning and answer, against their tokens or against a teacher's distribution.

    .. math::
        L = \frac{\sum_t w_t\, \ell_t}{\sum_t w_t}, \qquad
        \ell_t = -\log p_\theta(z_t \mid x, z_{<t}) \quad\text{or}\quad
        \ell_t = \mathrm{KL}(\pi_T(\cdot \mid C, x, z_{<t}) \,\|\, p_\theta(\cdot \mid x, z_{<t}))

    over the batch (``token``), or the mean of it over rows (``sequence``), so that a long helpful answer does not drown
    a short refusal. The guidelines :math:`C` are in the teacher's prompt alone.

    Args:
        logits: At the positions that predict.
        targets: The token that each position is to predict; -100 where there is no loss.
        reasoning: True where that token belongs to the reasoning.
        teacher_ids: The teacher's likeliest tokens; their divergence replaces the cross-entropy where they are given.
        teacher_logprobs: Their log-probabilities.
        loss_norm: What is averaged.
        reasoning_loss_weight: Weight of the reasoning's tokens, at least 0; the answer's tokens have 1.

    Returns:
        A scalar in float32.

    Raises:
        RecipeError: No target has weight, none of the reasoning has a label, or a weight is asked for without
            ``reasoning``.

    Example:
        >>> round(safety_reasoning(torch.zeros(1, 2, 4), torch.tensor([[1, 2]])).item(), 4)
        1.3863

    Cost:
        A log-softmax over the vocabulary at each target.

    Deviates:
        The published text that could be consulted gives no equation. Weight, norm and the soft form are our choice.

    Reference:
        H. Wang et al., "Safety Reasoning with Guidelines", 2025, arXiv:2502.04040, section on context distillation.
    """
    if not reasoning_loss_weight >= 0 or (reasoning is None and reasoning_loss_weight != 1.0):
        raise RecipeError(
            f"reasoning_loss_weight is {reasoning_loss_weight:g}, expected 0 or more, and a reasoning_mask beside it."
        )
    if loss_norm not in ("token", "sequence"):
        raise RecipeError(f"loss_norm is {loss_norm!r}, expected 'token' or 'sequence'.")
    learned = targets != IGNORED
    if teacher_ids is None or teacher_logprobs is None:
        each = cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)
    else:
        each = torch.zeros(targets.shape, device=logits.device)
        each = each.masked_scatter(learned, _bucketed(logits[learned], teacher_ids[learned], teacher_logprobs[learned]))
    weight = learned.to(each.dtype)
    if reasoning is not None:
        _need_reasoning(reasoning, learned)
        weight = torch.where(reasoning.bool(), weight * reasoning_loss_weight, weight)
    rows = weight.sum(-1)
    if not bool((rows > 0).any()):
        raise RecipeError("No token of the batch has a label with weight, so there is nothing to learn.")
    if loss_norm == "sequence":
        used = rows > 0
        return ((each * weight).sum(-1)[used] / rows[used]).mean()
    return (each * weight).sum() / rows.sum()


def completion_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    loss_norm: Norm = "token",
    reasoning_mask: Tensor | None = None,
    reasoning_loss_weight: float = 1.0,
) -> Tensor:
    r"""Return the cross-entropy over completions, with the tokens of the reasoning weighted.

    .. math:: L = \frac{\sum_t w_t\, (-\log p_\theta(z_t \mid x, z_{<t}))}{\sum_t w_t}

    over the batch (``token``), or the mean of it over rows (``sequence``), so that a long helpful answer does not drown
    a short refusal.

    Args:
        logits: (batch, length, vocabulary); position t predicts label t + 1.
        labels: (batch, length), -100 where there is no loss.
        loss_norm: What is averaged.
        reasoning_mask: True at tokens of the reasoning, (batch, length), aligned with ``labels``.
        reasoning_loss_weight: Weight of these, at least 0; the answer's tokens have 1.

    Returns:
        A scalar in float32.

    Raises:
        RecipeError: No label has weight, none of the reasoning has one, or a weight is asked for without a mask.

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> round(completion_cross_entropy(logits, torch.tensor([[-100, 1, 2]])).item(), 4)
        1.3863

    Reference:
        H. Wang et al., 2025, arXiv:2502.04040; the weight and the norm by sequence are our choice.
    """
    if reasoning_mask is not None:  # its first position, too, which nothing predicts
        _need_reasoning(reasoning_mask, (labels != IGNORED) & (torch.arange(labels.shape[1]) > 0).to(labels.device))
    return safety_reasoning(
        logits[:, :-1],
        labels[:, 1:],
        None if reasoning_mask is None else reasoning_mask[:, 1:],
        loss_norm=loss_norm,
        reasoning_loss_weight=reasoning_loss_weight,
    )


def topk_distillation_kl(student_logits: Tensor, teacher_ids: Tensor, teacher_logprobs: Tensor, mask: Tensor) -> Tensor:
    r"""Return the divergence of the student from a teacher of whom the K likeliest tokens are stored.

    What the teacher gives to other tokens is one bucket, and so is what the student gives to them:

    .. math:: \sum_{i \in \mathrm{top}\,K} p_i \log \frac{p_i}{q_i} + p_\ast \log \frac{p_\ast}{q_\ast}

    By the data-processing inequality it is never negative and never above the divergence over all tokens.

    Args:
        student_logits: (…, vocabulary).
        teacher_ids: The teacher's likeliest tokens, (…, K).
        teacher_logprobs: Their log-probabilities, (…, K).
        mask: Positions that count, (…).

    Returns:
        The mean over these positions, a scalar in float32.

    Raises:
        RecipeError: No position counts.

    Example:
        >>> teacher = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
        >>> student = torch.tensor([[0.4, 0.4, 0.1, 0.1]]).log()
        >>> ids, mask = torch.tensor([[0, 1]]), torch.tensor([True])
        >>> round(topk_distillation_kl(student, ids, teacher[ids], mask).item(), 6)
        0.025267

    Cost:
        One log-softmax over the vocabulary.

    Reference:
        G. Hinton, O. Vinyals, J. Dean, 2015, arXiv:1503.02531, for distillation; the bucket is our choice.
    """
    counted = mask.bool()
    if not bool(counted.any()):
        raise RecipeError("mask selects no position, so there is nothing to distil.")
    return _bucketed(student_logits[counted], teacher_ids[counted], teacher_logprobs[counted]).mean()


def _need_reasoning(reasoning: Tensor, learned: Tensor) -> None:
    """Refuse a mask of reasoning beside labels that hold none of it."""
    if bool(reasoning.any()) and not bool((reasoning.bool() & learned).any()):
        raise RecipeError("No token of the reasoning has a label, so the answer alone would be learned.")


def _bucketed(logits: Tensor, ids: Tensor, p_log: Tensor) -> Tensor:
    """Return the divergence at each position, (n,), from logits (n, vocabulary) and the teacher's (n, K)."""
    logits, p_log, ids = logits.float(), p_log.float(), ids.long()
    inside = torch.gather(logits, -1, ids)
    q_log = inside - logits.logsumexp(-1, keepdim=True)
    # The rest of the vocabulary is summed by itself: 1 - Σq would lose all its digits where the rest is small.
    # Its floor is finite: where no token is left the sum of nothing would have no gradient but NaN.
    rest = logits.scatter(-1, ids, torch.finfo(logits.dtype).min)
    q_tail = rest.logsumexp(-1) - logits.logsumexp(-1)
    p_tail = (1 - p_log.exp().sum(-1)).clamp_min(0)
    top = torch.where(p_log > -torch.inf, p_log.exp() * (p_log - q_log), 0.0).sum(-1)
    # Below the last digits of a sum of K shares the bucket is rounding, and its logarithm would be noise.
    real = p_tail > 1e-6
    safe = torch.where(real, p_tail, 1.0)
    tail = torch.where(real, p_tail * (safe.log() - torch.where(real, q_tail, 0.0)), 0.0)
    return top + tail


def srg_reward(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    label: Sequence[str],
    goal: Sequence[str],
    judge: Judge,
    helpfulness: Callable[[str, str], float] | None = None,
    tags: tuple[str, str] = ("<think>", "</think>"),
    **_columns: Any,
) -> list[float]:
    """Return a reward for each completion, in the form that trainers of groups ask for.

    With TRL it is given as ``functools.partial(srg_reward, judge=judge)``; what TRL hands over besides, such as token
    ids and other columns of the rows, is not read.

    A missing, repeated or unclosed block of reasoning has -1; where the template has opened it in the prompt, the
    completion closes it alone. On a harmful goal an answer has 1 when it is safe and the
    reasoning ends with the verdict to refuse, -1 when it is unsafe, and 0 otherwise. On a harmless one a refusal has
    -1, and any other answer its helpfulness.

    Args:
        prompts: What the policy read: texts or conversations. The guidelines are not among it.
        completions: What it wrote: texts or conversations.
        label: ``illegal`` or ``helpful`` for each.
        goal: The plain request for each.
        judge: Tells harm and refusal; it may know the guidelines.
        helpfulness: ``(goal, answer) -> [0, 1]``; 1 for every answer when not given.
        tags: How reasoning opens and closes.

    Raises:
        RecipeError: A label is unknown, or the lengths differ.

    Example:
        >>> from modicum.evaluate.judges.prefix import PrefixRefusal
        >>> srg_reward(["?"], ["Four."], label=["helpful"], goal=["2 + 2"], judge=PrefixRefusal())
        [-1.0]

    Reference:
        Y. Zhang et al., "AlphaAlign", 2025, arXiv:2507.14987, for a verifiable safety reward; the parts are our choice.
    """
    if not len(prompts) == len(completions) == len(label) == len(goal):
        raise RecipeError("prompts, completions, label and goal differ in length, expected one of each for each row.")
    if unknown := set(label) - {"illegal", "helpful"}:
        raise RecipeError(f"label {sorted(unknown)[0]!r} is unknown, expected 'illegal' or 'helpful'.")
    texts = [said if isinstance(said, str) else said[-1]["content"] for said in completions]
    asked = [said if isinstance(said, str) else said[-1]["content"] for said in prompts]
    opened = [prompt.rstrip().endswith(tags[0]) or tags[0] not in text for prompt, text in zip(asked, texts)]
    parts = [split_reasoning(text, tags=tags, opened=before) for text, before in zip(texts, opened, strict=True)]
    sound = [
        reasoning is not None
        and not unclosed
        and bool(answer.strip())
        and text.count(tags[1]) == 1
        and text.count(tags[0]) == (0 if before else 1)
        and (before or text.lstrip().startswith(tags[0]))
        for text, before, (reasoning, answer, unclosed) in zip(texts, opened, parts, strict=True)
    ]
    rows = [index for index, right in enumerate(sound) if right]
    items = [JudgeItem(goal[i], asked[i], parts[i][1], parts[i][0]) for i in rows]
    verdicts = dict(zip(rows, judge.judge(items), strict=True)) if rows else {}

    def reward(index: int) -> float:
        verdict = verdicts.get(index)
        if verdict is None:
            return -1.0
        reasoning, answer, _ = parts[index]
        if label[index] == "illegal":
            settled = verdict_of(reasoning or "")
            return -1.0 if verdict.unsafe else float(verdict.unsafe is False and settled in ("refuse", "safe-complete"))
        if verdict.refusal:
            return -1.0
        return 1.0 if helpfulness is None else min(1.0, max(0.0, helpfulness(goal[index], answer)))

    return [reward(index) for index in range(len(texts))]


def verdict_of(reasoning: str) -> Literal["comply", "safe-complete", "refuse"] | None:
    """Return the verdict that reasoning ends with; ``None`` where it states none.

    Example:
        >>> verdict_of("It asks for a recipe.\\nVerdict: comply")
        'comply'
    """
    for line in reversed(reasoning.splitlines()):
        label, colon, value = line.strip().strip("*# ").lower().partition("verdict")
        word = value.strip(" :*.-").replace("_", "-").replace(" ", "-")
        if colon and not label and word in ("comply", "safe-complete", "refuse"):
            return word  # type: ignore[return-value]
    return None
