"""Merge methods in plain float64 NumPy, one function each, after the equations of their papers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def deltas(base: Array, experts: Sequence[Array]) -> Array:
    return np.stack([expert - base for expert in experts])


def linear(experts: Sequence[Array], weights: Sequence[float], normalize: bool = True) -> Array:
    """Wortsman et al. 2022, Section 2."""
    total = sum(w * expert for w, expert in zip(weights, experts))
    return total / sum(weights) if normalize else total


def task_arithmetic(base: Array, experts: Sequence[Array], scale: float, weights: Sequence[float]) -> Array:
    """Ilharco et al. 2023, Section 2."""
    return base + scale * sum(w * d for w, d in zip(weights, deltas(base, experts)))


def trim(delta: Array, keep: int) -> Array:
    """Keep the largest magnitudes; of equal ones those that come first."""
    flat = delta.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")[:keep]
    out = np.zeros_like(flat)
    out[order] = flat[order]
    return out.reshape(delta.shape)


def elect(trimmed: Array, weights: Sequence[float], normalize: bool) -> Array:
    """Yadav et al. 2023, Algorithm 1, steps 2 and 3, entry by entry."""
    weighted = np.stack([w * d for w, d in zip(weights, trimmed)])
    out = np.zeros(trimmed.shape[1:])
    for position in np.ndindex(out.shape):
        values = weighted[(slice(None), *position)]
        sign = 1.0 if values.sum() >= 0 else -1.0
        agree = [t for t, value in enumerate(values) if value * sign > 0]
        divisor = sum(weights[t] for t in agree) if normalize else 1.0
        out[position] = sum(values[t] for t in agree) / (divisor if divisor else 1.0)
    return out


def ties(
    base: Array,
    experts: Sequence[Array],
    density: Sequence[float],
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Array:
    """Yadav et al. 2023, Algorithm 1, trimmed within the tensor."""
    weights = weights or [1.0] * len(experts)
    trimmed = np.stack([trim(d, max(1, int(p * d.size))) for d, p in zip(deltas(base, experts), density)])
    return base + scale * elect(trimmed, weights, normalize)


def polar(stack: Array, rtol: float) -> Array:
    """The closest matrix with orthonormal columns, weak directions dropped."""
    U, S, Vt = np.linalg.svd(stack, full_matrices=False)
    keep = (S / S[0]) ** 2 > rtol
    return U[:, keep] @ Vt[keep]


def tsv(base: Array, experts: Sequence[Array], rank: int, alpha: float = 1.0, rtol: float = 0.0) -> Array:
    """Gargiulo et al. 2025, Algorithm 1."""
    parts = [np.linalg.svd(d, full_matrices=False) for d in deltas(base, experts)]
    U = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    S = np.concatenate([s[:rank] for _, s, _ in parts])
    V = np.concatenate([v[:rank].T for _, _, v in parts], 1)
    return base + alpha * polar(U, rtol) @ np.diag(S) @ polar(V, rtol).T
