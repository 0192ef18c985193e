r"""Mask-enhanced next-token prediction (MEAP): hide a few input tokens, keep every target.

A random share of the *input* ids becomes a mask token; the causal model is trained on the clean next tokens as always.
Under the causal shift the mask at a position does not change the prediction *of* that position, so this is next-token
prediction under input token dropout, not a cloze task: what changes is that the preceding token, and every key of the
context, is hidden now and then. Suggested ratios are those of the paper: 0.15 in pre-training, 0.10 in fine-tuning.
The gains the paper reports have one source; docs/guide/masking.md says what our own small studies of regularisation,
robustness and retrieval found.

Reference code: scitix/MEAP, commit 0f5e837 (MIT); read for its behaviour, not copied.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from modicum.errors import ModicumError, RecipeError
from modicum.knobs import guarded
from modicum.objectives.batch import Batch, by_document, require_mask_token, with_ids
from modicum.objectives.selection import Sampling, select_positions
from modicum.philox import row_keys
from modicum.registry import objective
from modicum.types import NonNegativeInt, PositiveInt, UnitInterval

Scope: TypeAlias = Literal["row", "batch_shared", "reference"]
Schedule: TypeAlias = Literal["constant", "linear_warmup"]
REFERENCE_CYCLE = 51


@guarded
def mask_inputs(
    input_ids: Int[Tensor, "*rows t"],
    *,
    ratio: UnitInterval,
    mask_token_id: NonNegativeInt,
    scope: Scope = "row",
    step: NonNegativeInt = 0,
    sampling: Sampling = "fixed_count",
    min_masks: NonNegativeInt = 1,
    exclude_last: bool = True,
    protect_ids: Sequence[int] = (),
    eligible_mask: Bool[Tensor, "*rows t"] | None = None,
    spans: PositiveInt = 1,
    generator: torch.Generator | None = None,
    keys: Int64[Tensor, " n"] | None = None,
) -> Int[Tensor, "*rows t"]:
    r"""Return a copy of ``input_ids`` in which a random share is the mask token.

    .. math::
        k = \max(m, \lfloor P\, n \rfloor), \qquad n = \text{eligible positions of the row}

    A row's masks follow from its key alone: not from the batch around it, its padding, the device, or global random
    state.

    Args:
        input_ids: One row, or a batch of rows.
        ratio: Share P of the eligible positions to mask; 0 returns ``input_ids`` itself.
        mask_token_id: Id to write; it may not be protected nor occur in ``input_ids``. The second is only looked for
            on the CPU, because on an accelerator the answer would have to be waited for.
        scope: ``row`` draws for each row; ``batch_shared`` draws columns once, so rows with equal eligible positions
            get equal masks; ``reference`` is the released code: one of 51 fixed column sets, chosen by ``step``, less
            positions that are not eligible.
        step: Optimizer step; names the draw when neither ``generator`` nor ``keys`` is given.
        sampling: ``fixed_count`` masks exactly k positions; ``bernoulli`` masks each with probability P.
        min_masks: The least count m of a row that has eligible positions; fixed count only.
        exclude_last: Never mask the last position of a row that ``eligible_mask`` allows.
        protect_ids: Ids that are never masked.
        eligible_mask: Positions that may be masked, for example all that hold no padding; every position by default.
        spans: Length of the contiguous stretches that are masked together.
        generator: Draws the rows' keys; on the device of ``input_ids``.
        keys: The rows' keys, from :func:`~modicum.philox.row_keys`.

    Returns:
        Masked ids of the same shape, type and device.

    Raises:
        ModicumError: A knob is out of range, the mask id is protected or present, or the types do not fit.

    Example:
        >>> ids = torch.arange(16)
        >>> mask_inputs(ids, ratio=0.15, mask_token_id=99, scope="reference")
        tensor([ 0,  1,  2,  3,  4,  5,  6, 99,  8,  9, 10, 11, 12, 99, 14, 15])
        >>> int((mask_inputs(ids, ratio=0.5, mask_token_id=99) == 99).sum())  # of the 15 that are not the last
        7

    Cost:
        Time and memory linear in the ids; see benchmarks/results/meap-speed.json.

    Deviates:
        The released code masks the same columns in every row and rank, from 51 sets that repeat; ``row`` draws anew
        for every sample and epoch, and ``scope="reference"`` is theirs.

    Reference:
        Zhuang et al., "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More", ICML 2025,
        arXiv:2502.07490, section 3.1.
    """
    _check_ids(input_ids, mask_token_id, protect_ids)
    if ratio == 0 or input_ids.numel() == 0:
        return input_ids
    rows = input_ids.reshape(-1, input_ids.shape[-1])
    real = _real_positions(input_ids, eligible_mask).reshape(rows.shape)
    eligible = real
    if protect_ids:
        eligible = real & ~torch.isin(rows, torch.tensor(list(protect_ids), dtype=rows.dtype, device=rows.device))
    if exclude_last:
        eligible = eligible & ~_last(real)
    if scope == "reference":
        if sampling != "fixed_count" or spans != 1 or generator is not None or keys is not None:
            raise RecipeError(
                "scope 'reference' fixes the draw: leave sampling, spans, generator and keys, or use scope 'row'."
            )
        columns = reference_mask_positions(rows.shape[1], ratio=ratio, step=step)
        selected = torch.zeros_like(eligible)
        selected[:, torch.tensor(columns, dtype=torch.int64, device=rows.device)] = True
        selected = selected & eligible
    else:
        selected = select_positions(
            eligible,
            _keys(rows, step, generator, keys),
            real=real,
            ratio=ratio,
            sampling=sampling,
            min_masks=min_masks,
            spans=spans,
            shared=scope == "batch_shared",
        )
    return torch.where(selected, mask_token_id, rows).reshape(input_ids.shape)


@guarded
def reference_mask_positions(length: NonNegativeInt, *, ratio: UnitInterval, step: NonNegativeInt = 0) -> list[int]:
    """Return the columns that the released pre-training code masks at ``step`` in rows of ``length`` inputs.

    Example:
        >>> reference_mask_positions(4096, ratio=0.15)[:6]
        [2037, 3504, 1090, 1491, 2610, 3648]
    """
    if ratio == 0 or length < 2:
        return []
    count = min(max(1, int(length * ratio)), length - 1)
    # A private instance: the released code seeds Python's global one in the middle of training.
    return random.Random(50 + step % REFERENCE_CYCLE).sample(range(length - 1), count)  # noqa: S311


@guarded
def mask_ratio_at(
    step: NonNegativeInt,
    total_steps: int,
    *,
    ratio: UnitInterval,
    schedule: Schedule = "constant",
    warmup_share: UnitInterval = 2 / 3,
) -> float:
    """Return the ratio at ``step``: constant, or growing linearly from 0 over the first share of training.

    Example:
        >>> [mask_ratio_at(s, 300, ratio=0.4, schedule="linear_warmup") for s in (0, 100, 200, 299)]
        [0.0, 0.2, 0.4, 0.4]
    """
    if schedule == "constant" or warmup_share == 0:
        return ratio
    if total_steps < 1:
        raise RecipeError(f"schedule 'linear_warmup' needs total_steps of at least 1, got {total_steps}.")
    return ratio * min(1.0, step / (warmup_share * total_steps))


@objective("meap", paper="arXiv:2502.07490", laws={"labels_untouched", "mask_share"})
def meap(
    batch: Batch,
    step: int = 0,
    total_steps: int = 1,
    *,
    mask_token_id: NonNegativeInt | None = None,
    ratio: UnitInterval = 0.15,
    scope: Scope = "row",
    sampling: Sampling = "fixed_count",
    min_masks: NonNegativeInt = 1,
    exclude_last: bool = True,
    protect_ids: tuple[int, ...] | None = None,
    spans: PositiveInt = 1,
    schedule: Schedule = "constant",
    rng: torch.Generator | Int64[Tensor, " b"],
) -> Batch:
    r"""Mask a share of the input ids of a batch; labels stay as they are.

    .. math::
        L(\theta) = -\frac{1}{n} \sum_t \log p_\theta(x_t \mid x'_1, \ldots, x'_{t-1})

    with x' the masked inputs. A row that packs several documents (``position_ids`` that begin again at 0) is masked
    document by document, so that a document's masks do not depend on its neighbours; ``reference`` goes by row.

    Args:
        batch: ``input_ids`` and ``labels``, and where there are some ``attention_mask`` and ``position_ids``.
        step: Optimizer step.
        total_steps: Length of training in steps, for the schedule.
        mask_token_id: Id to write; a job finds or adds a mask token where the recipe names none.
        ratio: Share of eligible tokens that is masked, in [0, 1].
        scope: Who shares a draw; see :func:`mask_inputs`.
        sampling: Exact count or independent draws.
        min_masks: Least count for a row with eligible positions.
        exclude_last: Never mask a document's last token.
        protect_ids: Ids that are never masked; a job fills in the tokenizer's special ids where the recipe names none.
        spans: Length of a masked stretch.
        schedule: ``constant``, or ``linear_warmup`` over the first two thirds of training.
        rng: A generator, or one key per document.

    Returns:
        The batch with other ``input_ids``; every other entry is the same object.

    Raises:
        ModicumError: There are no labels, or :func:`mask_inputs` refuses.

    Example:
        >>> ids = torch.arange(8)[None]
        >>> out = meap({"input_ids": ids, "labels": ids}, mask_token_id=9, ratio=0.5, rng=torch.Generator())
        >>> int((out["input_ids"] == 9).sum()), out["labels"] is ids
        (3, True)

    Cost:
        No extra pass and no change of the model; the collator's share of a step is in
        benchmarks/results/meap-speed.json.

    Deviates:
        Special ids are protected by the collator's default, and validation is clean; see :func:`mask_inputs` for the
        draw.

    Reference:
        Zhuang et al., "Mask-Enhanced Autoregressive Prediction: Pay Less Attention to Learn More", ICML 2025,
        arXiv:2502.07490, section 3.1.
    """
    token = require_mask_token(mask_token_id)
    now = mask_ratio_at(step, total_steps, ratio=ratio, schedule=schedule)

    def mask(ids: Tensor, real: Tensor, keys: Tensor | None) -> Tensor:
        return mask_inputs(
            ids,
            ratio=now,
            mask_token_id=token,
            scope=scope,
            step=step,
            sampling=sampling,
            min_masks=min_masks,
            exclude_last=exclude_last,
            protect_ids=protect_ids or (),
            eligible_mask=real,
            spans=spans,
            keys=keys,
        )

    return with_ids(batch, by_document(batch, mask, rng=None if scope == "reference" else rng))


def _check_ids(input_ids: Tensor, mask_token_id: int, protect_ids: Sequence[int]) -> None:
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ModicumError(f"input_ids are {input_ids.dtype}, expected integers: pass token ids, not embeddings.")
    if mask_token_id in protect_ids:
        raise RecipeError(
            f"mask_token_id {mask_token_id} is among the protected ids {sorted(protect_ids)}, which hold pad, bos and "
            "eos. Choose an id of its own; ensure_mask_token(model, tokenizer) finds or adds one."
        )
    on_host = input_ids.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_host and bool((input_ids == mask_token_id).any()):
        raise ModicumError(
            f"mask_token_id {mask_token_id} occurs in the clean input_ids. Choose an id that the data never holds, and "
            "mask a batch once."
        )


def _real_positions(input_ids: Tensor, eligible_mask: Tensor | None) -> Tensor:
    if eligible_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if eligible_mask.shape != input_ids.shape or eligible_mask.dtype != torch.bool:
        raise ModicumError(
            f"eligible_mask is {eligible_mask.dtype} of shape {tuple(eligible_mask.shape)}, expected torch.bool of "
            f"shape {tuple(input_ids.shape)}."
        )
    return eligible_mask


def _last(real: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """Mark the last allowed position of each row."""
    rank = real.cumsum(-1)
    return real & (rank == rank[:, -1:])


def _keys(rows: Tensor, step: int, generator: torch.Generator | None, keys: Tensor | None) -> Tensor:
    if keys is None and generator is None:
        return row_keys(range(rows.shape[0]), seed=0, method="meap", epoch=step).to(rows.device)
    if keys is None and generator is not None:
        if generator.device.type != rows.device.type:
            raise ModicumError(
                f"generator is on {generator.device}, input_ids on {rows.device}. Make it with "
                f"torch.Generator({str(rows.device)!r})."
            )
        return torch.randint(2**63 - 1, (rows.shape[0],), generator=generator, device=rows.device)
    if keys is None or generator is not None or keys.shape != (rows.shape[0],):
        raise ModicumError(
            f"keys has shape {None if keys is None else tuple(keys.shape)}, expected one key for each of "
            f"{rows.shape[0]} rows and no generator beside it."
        )
    return keys.to(rows.device)
