"""Mediator in plain float64 NumPy: conflict, rules, stores, mixtures and routing, after the formulas of the spec."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from oracles.meap import word

Array = NDArray[np.float64]


def trimmed(delta: Array, keep: int) -> Array:
    """Keep the largest magnitudes; of equal ones those that come first."""
    flat = delta.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    out = np.zeros_like(flat)
    out[order[:keep]] = flat[order[:keep]]
    return out.reshape(delta.shape)


def conflict(deltas: Sequence[Sequence[Array]], *, aggregate: str, weight: str) -> float:
    """The conflict of one layer: ``deltas[t]`` lists the denoised tensors of expert t."""
    flat = [np.concatenate([tensor.reshape(-1) for tensor in tensors]) for tensors in deltas]
    n, size = len(flat), flat[0].size
    if aggregate == "pairwise_mean":
        values = []
        for s, t in combinations(range(n), 2):
            against = active = 0.0
            for i in range(size):
                a, b = flat[s][i], flat[t][i]
                if a and b:
                    w = 1.0 if weight == "count" else min(abs(a), abs(b))
                    active += w
                    against += w if a * b < 0 else 0.0
            values.append(against / active if active else 0.0)
        return sum(values) / len(values)
    against = active = 0.0
    for i in range(size):
        here = [d[i] for d in flat if d[i]]
        if len(here) > 1:
            w = 1.0 if weight == "count" else sorted(map(abs, here))[-2]
            active += w
            against += w if min(here) < 0 < max(here) else 0.0
    return against / active if active else 0.0


def mean_std(conflict: Mapping[str, float], c: float) -> set[str]:
    values = np.array(list(conflict.values()))
    if np.ptp(values) == 0:
        return set()
    return {name for name, d in conflict.items() if d > values.mean() + c * values.std()}


def within(conflict: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> list[str]:
    chosen: list[str] = []
    if len(set(conflict.values())) == 1 and (len(conflict) > 1 or not sum(conflict.values())):
        return chosen
    for name in sorted(conflict, key=lambda name: (-conflict[name], name)):
        if sum(sizes[n] for n in [*chosen, name]) > budget:
            break
        chosen.append(name)
    return chosen


def random_mask(key: int, size: int, density: float) -> NDArray[np.bool_]:
    return np.array([word(key, i, 0) < round(density * 2**32) for i in range(size)], bool)


def random_rescaled(delta: Array, *, key: int, density: float) -> Array:
    mask = random_mask(key, delta.size, density).reshape(delta.shape)
    return np.where(mask, delta / density, 0.0)


def magnitude(delta: Array, *, density: float) -> Array:
    return trimmed(delta, min(delta.size, max(1, int(density * delta.size))))


def magnitude_rescaled(delta: Array, *, density: float) -> Array:
    kept = magnitude(delta, density=density)
    held = np.abs(kept).sum()
    return kept * (np.abs(delta).sum() / held) if held else kept


def sign(delta: Array) -> Array:
    """One scale for each matrix; the sign of zero is +1."""
    stack = delta.reshape(-1, *delta.shape[-2:]) if delta.ndim > 2 else delta[None]
    found = [np.abs(m).mean() * np.where(m >= 0, 1.0, -1.0) for m in stack]
    return np.stack(found).reshape(delta.shape)


def low_rank(delta: Array, *, rank: int) -> Array:
    u, s, v = np.linalg.svd(delta.reshape(-1, delta.shape[-1]) if delta.ndim < 2 else delta, full_matrices=False)
    return np.asarray((u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]).reshape(delta.shape)


def softmax(z: Array) -> Array:
    e = np.exp(z - np.max(z))
    return np.asarray(e / e.sum())


def uncertainty(z: Array, temperature: float) -> float:
    if z.size == 1:
        return 0.0
    p = softmax(z / temperature)
    return float(-sum(q * math.log(q) for q in p if q > 0) / math.log(z.size))


def gated(z: Array, *, temperature: float, u_lo: float, u_hi: float, nucleus: float) -> Array:
    p, u = softmax(z / temperature), uncertainty(z, temperature)
    if u <= u_lo:
        return np.eye(z.size)[int(np.argmax(p))]
    if u >= u_hi:
        return np.full(z.size, 1 / z.size)
    return smallest_set(p, nucleus)


def smallest_set(p: Array, nucleus: float) -> Array:
    w, mass = np.zeros_like(p), 0.0
    for i in sorted(range(p.size), key=lambda i: (-p[i], i)):
        if mass >= nucleus - 1e-9:
            break
        w[i], mass = p[i], mass + p[i]
    return np.asarray(w / w.sum())


def loss(z: Array, y: Sequence[int], temperature: float) -> float:
    return float(np.mean([-np.log(softmax(row / temperature)[label]) for row, label in zip(z, y)]))


def residuals(x: Array, bases: Sequence[Array]) -> Array:
    return np.array([[np.linalg.norm(row - basis.T @ (basis @ row)) for basis in bases] for row in x])


def mahalanobis(x: Array, centers: Array, precision: Array) -> Array:
    return np.array([min(math.sqrt((row - c) @ precision @ (row - c)) for c in centers) for row in x])
