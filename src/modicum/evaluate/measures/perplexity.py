"""How well a model predicts text: perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

from modicum.evaluate.intervals import Estimate, ratio


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
