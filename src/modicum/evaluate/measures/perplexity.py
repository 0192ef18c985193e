"""How well a model predicts text: negative log-likelihood per document, for perplexity and bits per byte.

Every token of a document is scored exactly once. Documents longer than the window are read in overlapping windows, so
that each token but the first few has at least ``size - stride`` tokens before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import cross_entropy

from modicum.errors import RecipeError, UnsupportedError
from modicum.evaluate.intervals import Estimate, ratio

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Window(NamedTuple):
    """Tokens ``start`` to ``end`` are read; those from ``first`` on are scored."""

    start: int
    first: int
    end: int


def windows(length: int, *, size: int, stride: int) -> list[Window]:
    """Cut a document so that each token but the first, which has nothing before it, is scored exactly once.

    Args:
        length: Tokens of the document.
        size: Tokens of a window, at least 2.
        stride: Tokens by which a window moves on, from 1 to ``size - 1``. The larger it is, the faster the pass and the
            less context the tokens have.

    Example:
        >>> windows(6, size=4, stride=2)
        [Window(start=0, first=1, end=4), Window(start=2, first=4, end=6)]
    """
    if not 1 <= stride < size:
        raise RecipeError(f"stride is {stride} and the window {size} tokens, expected 1 ≤ stride < window.")
    found: list[Window] = []
    scored = 1
    while scored < length:
        end = min(scored + stride, length) if found else min(size, length)
        found.append(Window(max(end - size, 0), scored, end))
        scored = end
    return found


@torch.inference_mode()
def log_likelihoods(
    model: PreTrainedModel,
    documents: Sequence[Sequence[int]],
    *,
    size: int,
    stride: int,
    pad: int = 0,
    batch_size: int = 4,
    progress: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Return the negative log-likelihood of each document in nats, given its first token.

    Args:
        model: A causal language model.
        documents: Token ids; begin each with a token that is context only.
        size: Tokens of a window; see :func:`windows`.
        stride: Tokens by which a window moves on.
        pad: Token to fill shorter windows with; it is masked.
        batch_size: Windows at a time.
        progress: Called with the number of windows just finished.

    Raises:
        UnsupportedError: The window exceeds the model's positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and size > limit:
        raise UnsupportedError(f"A window of {size} tokens exceeds the model's {limit} positions. Lower max_length.")
    found = [
        (index, window)
        for index, document in enumerate(documents)
        for window in windows(len(document), size=size, stride=stride)
    ]
    order = sorted(range(len(found)), key=lambda i: (found[i][1].start - found[i][1].end, i))
    losses = [0.0] * len(found)
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        rows = [documents[found[i][0]][found[i][1].start : found[i][1].end] for i in chosen]
        length = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (length - len(row))] for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device=model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        for row, i in enumerate(chosen):
            window = found[i][1]
            first, end = window.first - window.start, window.end - window.start
            # One row at a time in float32, summed in float64: the whole batch would double the memory of the logits.
            nats = cross_entropy(logits[row, first - 1 : end - 1].float(), ids[row, first:end], reduction="none")
            losses[i] = float(nats.double().sum())
        progress(len(chosen))
    totals: list[list[float]] = [[] for _ in documents]
    for (index, _), loss in zip(found, losses, strict=True):
        totals[index].append(loss)
    return [math.fsum(parts) for parts in totals]


def bits_per_byte(nats: Sequence[float], sizes: Sequence[int], *, level: float = 0.95) -> Estimate:
    r"""Bits that the model needs per byte of raw UTF-8 text, which compares models with different tokenizers.

    .. math:: \frac{\sum_i \text{nats}_i}{\ln 2 \sum_i \text{bytes}_i}

    Args:
        nats: Negative log-likelihood of each document.
        sizes: Bytes of each document.
        level: Confidence of the interval, in (0, 1); documents are the unit of sampling.

    Example:
        >>> bits_per_byte([math.log(2) * 8], [4]).value
        2.0
    """
    return ratio([value / math.log(2) for value in nats], sizes, level=level)


def perplexity(nats: Sequence[float], tokens: Sequence[int], *, level: float = 0.95) -> Estimate:
    r"""Perplexity per token, :math:`\exp(\sum_i \text{nats}_i / \sum_i \text{tokens}_i)`.

    Args:
        nats: Negative log-likelihood of each document.
        tokens: Scored tokens of each document.
        level: Confidence of the interval, in (0, 1); documents are the unit of sampling.

    Example:
        >>> round(perplexity([math.log(8) * 3], [3]).value, 6)
        8.0
    """
    value, low, high, n = ratio(nats, tokens, level=level)
    return Estimate(_exp(value), None if low is None else _exp(low), None if high is None else _exp(high), n)


def _exp(x: float) -> float:
    # Beyond the range of float64 a model is simply lost; an infinite perplexity says so without an error.
    return math.exp(x) if x < 700 else math.inf
