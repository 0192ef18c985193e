r"""MEAP for fine-tuning: every long answer is learnt twice, once clean and once with a tenth of it hidden.

The clean copy keeps plain fine-tuning intact; the masked copy adds a loss at the hidden positions only. Because a
position's own mask does not change its own prediction, that loss is a random tenth of the answer's loss in the masked
context; ``copy_labels="answer"`` takes all of it (with ``masked_weight`` = ratio the same expectation at about a tenth
of the variance). ``layout="concat"`` puts both copies into one row, where the masked one may look the hidden tokens up
in the clean one: a different objective, as the paper's text has it; the released code has separate rows.

Reference code: scitix/MEAP, commit 0f5e837 (MIT); read for its behaviour, not copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor
from torch.nn import functional

from modicum.errors import UnsupportedError
from modicum.knobs import guarded
from modicum.objectives.batch import Batch, attended, keys_of, require_labels, require_mask_token
from modicum.objectives.sft_rows import (
    CLEAN,
    MASKED,
    Attend,
    CopyLabels,
    Layout,
    Region,
    Row,
    copies_attention,
    join_copies,
    masked_copy,
    shared_prefix,
)
from modicum.registry import objective
from modicum.types import IGNORED, NonNegative, NonNegativeInt, UnitInterval


@guarded
def meap_sft_loss(
    logits: Float[Tensor, "b t v"],
    labels: Int[Tensor, "b t"],
    is_masked_copy: Bool[Tensor, "b ..."],
    *,
    masked_weight: NonNegative | None = None,
    num_items: int | Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, ""]:
    r"""Return the next-token loss of clean and masked copies under an explicit weight and token count.

    .. math::
        L = \frac{1}{N} \Big( \sum_{\text{clean}} \ell_t + w \sum_{\text{masked}} \ell_t \Big)

    With N of the whole optimizer step, the gradient does not depend on how the step is split into batches.

    Args:
        logits: Predictions; the one at t is for the label at t + 1.
        labels: Targets, -100 where there is no loss.
        is_masked_copy: Per row or per token.
        masked_weight: Weight w of the masked copies' tokens; ``None`` is 1, the mean over tokens.
        num_items: Labelled tokens N of all batches of the step; by default the weights of this batch, summed.
        dtype: Precision of the reduction.

    Example:
        >>> logits, labels = torch.zeros(2, 3, 4), torch.tensor([[-100, 1, 2], [-100, -100, 3]])
        >>> loss = meap_sft_loss(logits, labels, torch.tensor([False, True]), masked_weight=0.5, num_items=3)
        >>> round(float(loss / torch.log(torch.tensor(4.0))), 6)  # (2 + 0.5) / 3
        0.833333
    """
    per_token = is_masked_copy if is_masked_copy.dim() == 2 else is_masked_copy[:, None].expand(labels.shape)
    weights = _weights(labels, per_token, masked_weight, dtype)[:, 1:]
    losses = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(dtype), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="none"
    )
    total = (losses * weights.flatten()).sum()
    return total / (weights.sum() if num_items is None else num_items)


@objective("meap_sft", paper="arXiv:2502.07490", laws={"clean_rows_kept"}, loss_head=True, whole_rows=True)
def meap_sft(
    batch: Batch,
    *,
    mask_token_id: NonNegativeInt | None = None,
    ratio: UnitInterval = 0.10,
    min_answer_tokens: NonNegativeInt = 50,
    layout: Layout = "separate",
    concat_attend: Attend = "causal",
    share_prefix: bool = False,
    mask_region: Region = "answer",
    copy_labels: CopyLabels = "masked",
    masked_weight: NonNegative | None = None,
    redraw_each_epoch: bool = True,  # noqa: ARG001 - the collator reads it when it names the draw
    protect_ids: tuple[int, ...] | None = None,
    rng: torch.Generator | Int64[Tensor, " b"],
) -> Batch:
    r"""Add a masked copy of every row with a long answer, with the loss at the masked positions.

    .. math::
        L(\theta) = -\sum_{t \in U_q} \log p_\theta(x_t \mid x_{<t}) - \sum_{t \in U_m} \log p_\theta(x_t \mid \hat
        x_{<t})

    An answer is a stretch of labelled tokens, so a chat with several answers keeps its history and each long answer
    is masked. Special ids neither count nor are masked.

    Args:
        batch: ``input_ids`` and ``labels`` (-100 on prompts), one document per row.
        mask_token_id: Id to write; a job finds or adds a mask token where the recipe names none.
        ratio: Share of the maskable tokens, in [0, 1].
        min_answer_tokens: Answers must have more tokens than this to be masked.
        layout: ``separate`` rows, or ``concat`` for both copies in one.
        concat_attend: Whether a masked copy may attend to its clean one, in ``concat``.
        share_prefix: One prompt for both copies; needs ``concat`` and ``isolated``.
        mask_region: Tokens that may be masked.
        copy_labels: Loss of the copy at masked positions, or on the whole answer.
        masked_weight: Weight of the masked copies' tokens; ``None`` is the plain mean over tokens.
        redraw_each_epoch: Draw anew in each epoch; the caller who supplies ``rng`` acts on it.
        protect_ids: Ids that are never masked; a job fills in the tokenizer's special ids where the recipe names none.
        rng: A generator, or one key per row.

    Returns:
        A padded batch of ``input_ids``, ``labels``, ``attention_mask`` and ``loss_weights``; ``concat`` adds
        ``position_ids`` and, when isolated, an ``attention_mask`` of shape (rows, 1, tokens, tokens).

    Raises:
        ModicumError: There are no labels, or a row packs several documents.

    Example:
        >>> ids = torch.arange(60)[None]
        >>> labels = torch.where(ids < 5, -100, ids)
        >>> out = meap_sft({"input_ids": ids, "labels": labels}, mask_token_id=99, rng=torch.Generator())
        >>> out["input_ids"].shape, (out["labels"][1] != -100).sum()
        (torch.Size([2, 60]), tensor(5))

    Cost:
        Up to twice the tokens per batch; with a shared prefix, one prompt and two answers. The head only needs the
        labelled positions: benchmarks/results/meap-speed.json.

    Deviates:
        Chats keep their history; ids and labels are cut together where a row is too long; an over-long prompt is
        counted; masks are drawn anew in each epoch as the paper says, not once.

    Reference:
        Zhuang et al., "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More", ICML 2025,
        arXiv:2502.07490, section 3.2.
    """
    require_labels(batch)
    token = require_mask_token(mask_token_id)
    ids, labels, real = batch["input_ids"], batch["labels"], attended(batch)
    if batch.get("position_ids") is not None and _packs(batch["position_ids"], real):
        raise UnsupportedError(
            "meap_sft copies whole rows, and a row of this batch packs several documents. Turn packing off, or expand "
            "the data set with expand_sft before it is packed."
        )
    keys = keys_of(rng, ids.shape[0], ids.device)
    eligible = _maskable(ids, labels, real, mask_region, min_answer_tokens, protect_ids or ())
    masked_ids, masked_labels = masked_copy(
        ids, labels, eligible, keys, mask_token_id=token, ratio=ratio, copy_labels=copy_labels
    )
    doubled = (masked_ids != ids).any(-1)
    rows: list[Row] = []
    for number in range(ids.shape[0]):
        keep = real[number]
        count = int(keep.sum())
        clean = Row(ids[number][keep].tolist(), labels[number][keep].tolist(), list(range(count)), [CLEAN] * count)
        if not doubled[number]:
            rows.append(clean)
            continue
        masked = Row(
            masked_ids[number][keep].tolist(),
            masked_labels[number][keep].tolist(),
            clean.position_ids,
            [MASKED] * count,
        )
        if layout == "separate":
            rows += [clean, masked]
        else:
            rows.append(join_copies(clean, masked, prefix=shared_prefix(clean) if share_prefix else 0))
    return _pad(rows, layout, concat_attend, masked_weight, like=batch)


def _maskable(
    ids: Tensor, labels: Tensor, real: Tensor, region: Region, least: int, protect: Sequence[int]
) -> Bool[Tensor, "b t"]:
    plain = real & ~torch.isin(ids, torch.tensor(list(protect), dtype=ids.dtype, device=ids.device))
    labelled = labels != IGNORED
    # Number the answers from 1; unlabelled places go to bin 0.
    begins = labelled & ~functional.pad(labelled, (1, 0))[:, :-1]
    answer = begins.cumsum(-1) * labelled
    tokens = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.int64, device=ids.device)
    tokens.scatter_add_(1, answer, (plain & labelled).long())
    long = tokens.gather(1, answer) > least
    answers = plain & labelled & long
    if region == "answer":
        return answers
    prompts = plain & ~labelled & answers.any(-1, keepdim=True)
    return prompts if region == "prompt" else prompts | answers


def _packs(position_ids: Tensor, real: Tensor) -> bool:
    return bool((((position_ids == 0) & real).sum(-1) > 1).any())


def _pad(rows: list[Row], layout: Layout, attend: Attend, masked_weight: float | None, *, like: Batch) -> Batch:
    ids = like["input_ids"]
    padding = ids[~attended(like)]
    fill = int(padding[0]) if padding.numel() else 0
    # Where the inner collator padded to a multiple, so does this.
    longest = max(max(len(row.input_ids) for row in rows), ids.shape[1])

    def stack(lists: Iterator[list[int]], value: int) -> Tensor:
        padded = [items + [value] * (longest - len(items)) for items in lists]
        return torch.tensor(padded, dtype=ids.dtype, device=ids.device)

    copy_index = stack((row.copy_index for row in rows), -1)
    labels = stack((row.labels for row in rows), IGNORED)
    real = copy_index >= 0
    out: dict[str, Any] = {
        "input_ids": stack((row.input_ids for row in rows), fill),
        "labels": labels,
        "attention_mask": real.to(ids.dtype),
        "loss_weights": _weights(labels, copy_index == MASKED, masked_weight),
    }
    if layout == "concat":
        out["position_ids"] = stack((row.position_ids for row in rows), 0)
        if attend == "isolated":
            out["attention_mask"] = copies_attention(copy_index, attend=attend, real=real)
    return out


def _weights(
    labels: Tensor, is_masked_copy: Tensor, masked_weight: float | None, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "b t"]:
    weights = (labels != IGNORED).to(dtype)
    return weights if masked_weight is None else torch.where(is_masked_copy, weights * masked_weight, weights)
