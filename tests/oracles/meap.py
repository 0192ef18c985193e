"""Slow, independent transcription of the MEAP draw and losses in Python integers and NumPy float64."""

from __future__ import annotations

import math
import random

import numpy as np

MASK32 = 0xFFFFFFFF


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011) on Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK32, (p0 >> 32) ^ c3 ^ k1, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def word(key: int, place: int, stream: int = 0) -> int:
    return philox4x32((place // 4, stream, 0, 0), (key & MASK32, key >> 32))[place % 4]


def selected(
    eligible: list[bool], real: list[bool], key: int, ratio: float, least: int = 1, spans: int = 1
) -> set[int]:
    """Positions that the smallest words pick, ties by order of the tokens."""
    n = sum(eligible)
    count = min(n, max(least, math.floor(n * ratio))) if ratio > 0 else 0
    offset = word(key, 0, stream=1) % spans if spans > 1 else 0
    ranked = []
    token = -1
    for position, (may, is_real) in enumerate(zip(eligible, real, strict=True)):
        token += is_real
        if may:
            place = token if spans == 1 else (token + offset) // spans
            ranked.append((word(key, place), token, position))
    return {position for _, _, position in sorted(ranked)[:count]}


def reference_columns(length: int, ratio: float, step: int) -> list[int]:
    """The released pre-training code's columns."""
    return random.Random(50 + step % 51).sample(range(length - 1), max(1, int(length * ratio)))


def sft_loss(logits: np.ndarray, labels: np.ndarray, masked: np.ndarray, weight: float, items: float) -> float:
    """Weighted sum of next-token losses over ``items`` in float64."""
    total = 0.0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] == -100:
                continue
            row = logits[b, t - 1].astype(np.float64)
            loss = np.log(np.exp(row - row.max()).sum()) + row.max() - row[labels[b, t]]
            total += loss * (weight if masked[b] else 1.0)
    return total / items
