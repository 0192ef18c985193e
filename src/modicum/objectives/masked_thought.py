"""Masked Thought (MFT): hide answer tokens at a rate that grows in training, and learn the whole answer.

The forerunner of MEAP for fine-tuning: one row instead of two, a higher rate (0.4), loss on all answer tokens.
Suggested knobs: the values of the released GSM8K script.

Reference code: ChangyuChen347/MaskedThought; read for its behaviour, not copied.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from jaxtyping import Int64
from torch import Tensor

from modicum.objectives.batch import Batch, documents, keys_of, require_labels, require_mask_token, with_ids
from modicum.objectives.meap import mask_ratio_at
from modicum.objectives.selection import select_positions
from modicum.objectives.token_dropout import random_ids
from modicum.registry import objective
from modicum.types import IGNORED, NonNegativeInt, PositiveInt, UnitInterval

Replacement: TypeAlias = Literal["mask", "random"]


@objective("masked_thought", paper="arXiv:2403.02178", laws={"labels_untouched"})
def masked_thought(
    batch: Batch,
    step: int = 0,
    total_steps: int = 1,
    *,
    mask_token_id: NonNegativeInt | None = None,
    ratio: UnitInterval = 0.4,
    warmup_share: UnitInterval = 2 / 3,
    replacement: Replacement = "mask",
    vocab_size: PositiveInt | None = None,
    protect_ids: tuple[int, ...] | None = None,
    rng: torch.Generator | Int64[Tensor, " b"],
) -> Batch:
    r"""Replace each labelled token of the input with probability p, which grows linearly to ``ratio``.

    .. math::
        p_s = P \min(1, s / (w S))

    Args:
        batch: ``input_ids`` and ``labels`` (-100 on prompts).
        step: Optimizer step s.
        total_steps: Length S of training in steps.
        mask_token_id: Id to write, for ``replacement="mask"``.
        ratio: Probability P at the end of the warm-up, in [0, 1].
        warmup_share: Share w of training over which the probability grows.
        replacement: Write the mask token, or a uniformly random id.
        vocab_size: Ids to draw from, for ``replacement="random"``.
        protect_ids: Ids that are never replaced.
        rng: A generator, or one key per document.

    Returns:
        The batch with other ``input_ids``.

    Raises:
        ModicumError: Labels, the mask id or the vocabulary's size are missing.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> labels = torch.where(ids < 4, -100, ids)
        >>> masked_thought({"input_ids": ids, "labels": labels}, 1, 1, mask_token_id=9, ratio=1.0,
        ...                rng=torch.Generator())["input_ids"]
        tensor([[0, 1, 2, 3, 9, 9, 9, 9]])

    Cost:
        Linear in the ids; no extra pass.

    Deviates:
        Draws are named by sample, not by the global generator.

    Reference:
        Chen et al., "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning
        of Language Models", ACL 2024, arXiv:2403.02178, section 3.
    """
    require_labels(batch)
    ids: Tensor = batch["input_ids"]
    found = documents(batch)
    keys = keys_of(rng, found.index.shape[0], ids.device)
    now = mask_ratio_at(step, total_steps, ratio=ratio, schedule="linear_warmup", warmup_share=warmup_share)
    rows, labels = ids.flatten()[found.index], batch["labels"].flatten()[found.index]
    protected = torch.isin(rows, torch.tensor(protect_ids or (), dtype=ids.dtype, device=ids.device))
    eligible = found.real & (labels != IGNORED) & ~protected
    selected = select_positions(eligible, keys, ratio=now, real=found.real, sampling="bernoulli")
    if replacement == "mask":
        written = torch.full_like(rows, require_mask_token(mask_token_id))
    else:
        written = random_ids(rows, keys, found.real, vocab_size=vocab_size)
    flat = ids.flatten().clone()
    flat[found.index[found.real]] = torch.where(selected, written, rows)[found.real]
    return with_ids(batch, flat.reshape(ids.shape))
