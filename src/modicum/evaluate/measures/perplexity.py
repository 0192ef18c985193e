"""How well a model predicts text: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from modicum.errors import RecipeError
from modicum.evaluate.intervals import Estimate, ratio
from modicum.evaluate.rows import Rows
from modicum.evaluate.subject import Result, Subject
from modicum.registry import measure
from modicum.types import PositiveInt


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


def _check(*, max_length: int, stride: int | None) -> None:
    if max_length < 2 or (stride or 1) >= max_length:
        raise RecipeError(f"stride {stride} must be less than data.max_length {max_length}")


def _work(count: int, *, metric: str) -> str:
    return f"{metric} of {count} documents"


def _estimate(
    items: Sequence[Result], *, level: float, metric: Literal["bits_per_byte", "perplexity"] = "bits_per_byte"
) -> Estimate:
    nats = [item["nats"] for item in items]
    if metric == "perplexity":
        return perplexity(nats, [item["tokens"] for item in items], level=level)
    return bits_per_byte(nats, [item["bytes"] for item in items], level=level)


def _difference(a: Sequence[Result], b: Sequence[Result], *, level: float) -> Estimate:
    # Perplexities of models with different tokenizers count different tokens; bytes are the same for all.
    nats = [x["nats"] - y["nats"] for x, y in zip(a, b, strict=True)]
    return bits_per_byte(nats, [item["bytes"] for item in a], level=level)


@measure(
    "perplexity",
    laws={"right_is_better"},
    rows="text",
    better="lower",
    estimate=_estimate,
    difference=_difference,
    compares="bits_per_byte",
    work=_work,
    check=_check,
)
def perplexity_measure(
    rows: Rows,
    subject: Subject,
    *,
    stride: PositiveInt | None = None,
    max_bytes: PositiveInt | None = None,
    batch_size: PositiveInt = 4,
    max_length: int,
) -> list[Result]:
    """Measure how well a model predicts text, window by window of ``data.max_length`` tokens.

    Args:
        rows: Documents.
        subject: The model.
        stride: Tokens between windows; no overlap when not given.
        max_bytes: Read only the beginning of each document.
        batch_size: Windows at a time.
        max_length: Tokens of a window: that of the data.
        metric: ``bits_per_byte`` can be compared between tokenizers, ``perplexity`` cannot.

    Returns:
        Negative log-likelihood in nats, scored tokens and bytes of each document.

    Example:
        >>> from modicum.registry import measure
        >>> measure["perplexity"].knobs({})["metric"]
        'bits_per_byte'

    Cost:
        ``max_length / stride`` forward passes over the text.

    Deviates:
        Every document is read after one token of context, so that its own first token is scored too.

    Reference:
        F. Jelinek et al., "Perplexity: a measure of the difficulty of speech recognition tasks", 1977.
    """
    # A cut within a character leaves bytes that are no text: the incomplete character is dropped.
    texts = [row["text"].encode()[:max_bytes].decode(errors="ignore") for row in rows.rows]
    found = subject.likelihoods(
        [{"text": text} for text in texts], size=max_length, stride=stride or max_length - 1, batch_size=batch_size
    )
    return [
        {"index": index, "nats": each.nats, "tokens": each.tokens, "bytes": len(text.encode())}
        for index, (text, each) in enumerate(zip(texts, found, strict=True))
    ]
