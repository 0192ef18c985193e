"""Rows of MEAP fine-tuning: a clean copy, a masked copy, and how the two may share one row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from modicum.errors import ModicumError, RecipeError
from modicum.knobs import guarded
from modicum.objectives.batch import keys_of
from modicum.objectives.meap import mask_inputs
from modicum.types import IGNORED, NonNegativeInt, PositiveInt, UnitInterval

Layout: TypeAlias = Literal["separate", "concat"]
Attend: TypeAlias = Literal["causal", "isolated"]
Region: TypeAlias = Literal["answer", "prompt", "all"]
CopyLabels: TypeAlias = Literal["masked", "answer"]
SHARED, CLEAN, MASKED = 0, 1, 2  # copy_index: a prefix both copies see, the clean copy, the masked copy


@dataclass(frozen=True)
class Row:
    """One row of training data, as lists of equal length."""

    input_ids: list[int]
    labels: list[int]
    position_ids: list[int]
    copy_index: list[int]


@guarded
def expand_sft_example(
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    *,
    mask_token_id: NonNegativeInt,
    eos_token_id: NonNegativeInt,
    max_length: PositiveInt,
    ratio: UnitInterval = 0.10,
    min_answer_tokens: NonNegativeInt = 50,
    layout: Layout = "separate",
    concat_attend: Attend = "causal",
    share_prefix: bool = False,
    mask_region: Region = "answer",
    copy_labels: CopyLabels = "masked",
    generator: torch.Generator | Int64[Tensor, " 1"],
) -> list[dict[str, list[int]]]:
    """Turn a prompt and its answer into a clean row and, when the answer is long enough, a masked one.

    Args:
        prompt_ids: Ids of the prompt, or of the whole history before the answer.
        answer_ids: Ids of the answer without the end token.
        mask_token_id: Id to write.
        eos_token_id: End token; it is appended where it fits.
        max_length: Longest copy; ids and labels of longer ones are cut together.
        ratio: Share of the maskable tokens to mask; at least one is.
        min_answer_tokens: Only answers of more tokens than this get a masked copy.
        layout: ``separate`` rows, or one row that holds both copies (up to twice ``max_length``).
        concat_attend: Whether the masked copy may attend to the clean one; :func:`copies_attention` makes the mask.
        share_prefix: With ``concat`` and ``isolated``, keep one prompt for both copies.
        mask_region: Tokens that may be masked.
        copy_labels: Loss of the masked copy: at the masked positions, or on the whole answer.
        generator: A generator, or one key.

    Returns:
        Rows with ``input_ids``, ``labels``, ``position_ids`` and ``copy_index``; none when the prompt leaves no room
        for the answer.

    Raises:
        ModicumError: The answer is empty, or a knob is out of range.

    Example:
        >>> rows = expand_sft_example([1, 2], list(range(10, 61)), mask_token_id=99, eos_token_id=0, max_length=80,
        ...                           generator=torch.Generator().manual_seed(0))
        >>> len(rows), rows[1]["input_ids"].count(99), sum(label != -100 for label in rows[1]["labels"])
        (2, 5, 5)
    """
    if not len(answer_ids):
        raise ModicumError("The answer is empty, expected at least one token. Drop the example.")
    if share_prefix and not (layout == "concat" and concat_attend == "isolated" and mask_region == "answer"):
        raise RecipeError("share_prefix needs layout 'concat', concat_attend 'isolated' and mask_region 'answer'.")
    ids = [*prompt_ids, *answer_ids, eos_token_id][:max_length]
    prompt = len(prompt_ids)
    if prompt >= len(ids):
        return []
    labels = [IGNORED] * prompt + ids[prompt:]
    clean = Row(ids, labels, list(range(len(ids))), [CLEAN] * len(ids))
    if len(answer_ids) <= min_answer_tokens or ratio == 0:
        return [vars(clean)]
    answer = range(prompt, min(prompt + len(answer_ids), len(ids)))
    allowed = {"answer": answer, "prompt": range(prompt), "all": range(answer.stop)}[mask_region]
    eligible = torch.zeros(1, len(ids), dtype=torch.bool)
    eligible[0, allowed.start : allowed.stop] = True
    masked_ids, masked_labels = masked_copy(
        torch.tensor([ids]),
        torch.tensor([labels]),
        eligible,
        keys_of(generator, 1, eligible.device),
        mask_token_id=mask_token_id,
        ratio=ratio,
        copy_labels=copy_labels,
    )
    masked = Row(masked_ids[0].tolist(), masked_labels[0].tolist(), clean.position_ids, [MASKED] * len(ids))
    if layout == "separate":
        return [vars(clean), vars(masked)]
    return [vars(join_copies(clean, masked, prefix=max(prompt - 1, 0) if share_prefix else 0))]


def masked_copy(
    input_ids: Int[Tensor, "b t"],
    labels: Int[Tensor, "b t"],
    eligible: Bool[Tensor, "b t"],
    keys: Int64[Tensor, " b"],
    *,
    mask_token_id: NonNegativeInt,
    ratio: UnitInterval,
    copy_labels: CopyLabels = "masked",
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Return the masked copy's ids and labels: the loss stands at masked positions, or where ``labels`` has it."""
    masked = mask_inputs(
        input_ids,
        ratio=ratio,
        mask_token_id=mask_token_id,
        eligible_mask=eligible,
        exclude_last=False,
        keys=keys,
    )
    if copy_labels == "answer":
        return masked, labels
    return masked, torch.where(masked == mask_token_id, input_ids, IGNORED)


@guarded
def chat_row(
    turns: Iterable[tuple[Sequence[int], Sequence[int]]], *, eos_token_id: NonNegativeInt
) -> tuple[list[int], list[int]]:
    """Join (prompt, answer) turns into one row that keeps the history, with labels on every answer and its end token.

    Example:
        >>> chat_row([([1], [5, 6]), ([2], [7])], eos_token_id=0)
        ([1, 5, 6, 0, 2, 7, 0], [-100, 5, 6, 0, -100, 7, 0])
    """
    ids: list[int] = []
    labels: list[int] = []
    for prompt, answer in turns:
        if not len(answer):
            raise ModicumError("An answer of the chat is empty, expected at least one token. Drop the turn.")
        ids += [*prompt, *answer, eos_token_id]
        labels += [*[IGNORED] * len(prompt), *answer, eos_token_id]
    return ids, labels


@dataclass(frozen=True)
class Expansion:
    """Rows of a data set, and how many of its examples were duplicated, dropped or truncated."""

    rows: list[dict[str, list[int]]]
    duplicated: int
    dropped: int
    truncated: int


@guarded
def expand_sft(
    examples: Iterable[tuple[Sequence[int], Sequence[int]]],
    *,
    max_length: PositiveInt,
    generator: torch.Generator,
    **knobs: Any,
) -> Expansion:
    """Expand every (prompt, answer) of a data set once; masks stay the same over epochs, as in the released code.

    Rows may then be packed. An example whose prompt leaves no room is dropped, one that is too long is cut, and both
    are counted.
    """
    rows: list[dict[str, list[int]]] = []
    duplicated = dropped = truncated = 0
    for prompt, answer in examples:
        found = expand_sft_example(prompt, answer, max_length=max_length, generator=generator, **knobs)
        rows += found
        duplicated += any(MASKED in row["copy_index"] for row in found)
        dropped += not found
        truncated += bool(found) and len(prompt) + len(answer) + 1 > max_length
    return Expansion(rows, duplicated, dropped, truncated)


def copies_attention(
    copy_index: Int[Tensor, "b t"], *, attend: Attend = "isolated", real: Bool[Tensor, "b t"] | None = None
) -> Bool[Tensor, "b 1 t t"]:
    """Return who may attend to whom in rows that hold both copies: causal, and isolated copies share a prefix only.

    Example:
        >>> copies_attention(torch.tensor([[0, 1, 2]]))[0, 0].int().tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1]]
    """
    length = copy_index.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool, device=copy_index.device).tril()[None]
    if attend == "isolated":
        keys = copy_index[:, None, :]
        allowed = allowed & ((keys == SHARED) | (keys == copy_index[:, :, None]))
    if real is not None:
        # A padded query keeps itself, so that no row of the softmax is empty.
        own = torch.eye(length, dtype=torch.bool, device=copy_index.device)
        allowed = allowed & real[:, None, :] | own
    return allowed.expand(copy_index.shape[0], -1, -1)[:, None]


def shared_prefix(row: Row) -> int:
    """Return how much of a row both copies can share: the prompt less its last token.

    That token predicts the first of the answer, so each copy needs its own.
    """
    prompt = next((i for i, label in enumerate(row.labels) if label != IGNORED), 0)
    return max(prompt - 1, 0)


def join_copies(clean: Row, masked: Row, *, prefix: int) -> Row:
    """Put both copies into one row; the first token of a copy has no label, as it has no token before it."""
    return Row(
        clean.input_ids + masked.input_ids[prefix:],
        [*clean.labels, IGNORED, *masked.labels[prefix + 1 :]],
        clean.position_ids + masked.position_ids[prefix:],
        [SHARED] * prefix + clean.copy_index[prefix:] + masked.copy_index[prefix:],
    )
