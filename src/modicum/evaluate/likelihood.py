"""Negative log-likelihood of token ids under a model, window by window.

Every token of a document but its context is scored exactly once. Documents longer than the window are read in
overlapping windows, so that each token but the first few has at least ``size - stride`` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from modicum.errors import RecipeError
from modicum.evaluate.generation import requests
from modicum.knobs import guarded
from modicum.types import NonNegativeInt, PositiveInt
from modicum.vocabulary import check_ids, check_positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` are read; those from ``first`` on are scored."""

    start: int
    first: int
    end: int


def windows(length: int, *, size: int, stride: int, context: int = 1) -> list[Window]:
    """Cut a document so that each token but the first, which has nothing before it, is scored exactly once.

    Args:
        length: Tokens of the document.
        size: Tokens of a window, at least 2.
        stride: Tokens by which a window moves on, from 1 to ``size - 1``. The larger it is, the faster the pass and the
            less context the tokens have.
        context: First tokens that are not scored, at least 1.

    Example:
        >>> windows(6, size=4, stride=2)
        [Window(start=0, first=1, end=4), Window(start=2, first=4, end=6)]
    """
    if not 1 <= stride < size:
        raise RecipeError(f"stride is {stride} and the window {size} tokens, expected 1 ≤ stride < window.")
    found: list[Window] = []
    scored = max(context, 1)
    while scored < length:
        # The first window is read whole; behind a context that fills it, it begins where a later one would.
        end = min(scored + stride if found else max(size, scored + stride), length)
        found.append(Window(max(end - size, 0), scored, end))
        scored = end
    return found


def right_padded(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one batch, filled up behind, and its mask, both (n, length).

    Example:
        >>> ids, mask = right_padded([[5], [6, 7]], 0)
        >>> ids.tolist(), mask.tolist()
        ([[5, 0], [6, 7]], [[1, 0], [1, 1]])
    """
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=device)
    return ids, mask


def check_window(model: PreTrainedModel, size: int) -> None:
    """Refuse windows of so many tokens that a model cannot read.

    Raises:
        UnsupportedError: They exceed its positions.
    """
    check_positions(model, size, f"A window of {size} tokens exceeds", "Lower max_length.")


@guarded
@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    size: PositiveInt,
    stride: PositiveInt,
    pad: NonNegativeInt = 0,
    batch_size: PositiveInt = 4,
    contexts: Sequence[int] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Return the negative log-likelihood of each document in nats, given its first token or its whole context.

    A routed model's weights of its experts are those of the context alone: what is scored must not choose them.

    Args:
        model: A causal language model.
        documents: Token ids; begin each with a token that is context only.
        size: Tokens of a window; see :func:`windows`.
        stride: Tokens by which a window moves on.
        pad: Token to fill shorter windows with; it is masked.
        batch_size: Windows at a time.
        contexts: First tokens of each document that are context only; one when not given.
        progress: Called with the number of windows just finished.

    Raises:
        UnsupportedError: The window exceeds the model's positions, or a token has no embedding.
    """
    check_window(model, size)
    check_ids(model, documents)
    contexts = contexts or [1] * len(documents)
    found = [
        (index, window)
        for index, (document, context) in enumerate(zip(documents, contexts, strict=True))
        for window in windows(len(document), size=size, stride=stride, context=context)
    ]
    losses = [0.0] * len(found)
    prompts = [document[: max(context, 1)] for document, context in zip(documents, contexts, strict=True)]
    for numbers, within in requests(model, prompts):
        together = set(numbers)
        asked = [i for i, (index, _) in enumerate(found) if index in together]
        order = sorted(asked, key=lambda i: (found[i][1].start - found[i][1].end, i))
        with within:
            for begin in range(0, len(order), batch_size):
                chosen = order[begin : begin + batch_size]
                rows = [documents[found[i][0]][found[i][1].start : found[i][1].end] for i in chosen]
                values = _losses(model, rows, [found[i][1] for i in chosen], pad)
                for i, value in zip(chosen, values, strict=True):
                    losses[i] = value
                progress(len(chosen))
    totals: list[list[float]] = [[] for _ in documents]
    for (index, _), loss in zip(found, losses, strict=True):
        totals[index].append(loss)
    return [math.fsum(parts) for parts in totals]


def _losses(
    model: PreTrainedModel, rows: Sequence[Sequence[int]], chosen: Sequence[Window], pad: int
) -> Iterator[float]:
    """Yield the negative log-likelihood of what each window of a batch scores."""
    ids, mask = right_padded(rows, pad, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for row, window in enumerate(chosen):
        first, end = window.first - window.start, window.end - window.start
        # One row at a time in float32, summed in float64: the whole batch would double the memory of the logits.
        nats = cross_entropy(logits[row, first - 1 : end - 1].float(), ids[row, first:end], reduction="none")
        yield float(nats.double().sum())
