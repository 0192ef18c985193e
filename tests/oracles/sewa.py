"""Choosing checkpoints by a loss, in NumPy float64: masks, their slopes, the search, and searches by brute force."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise, permutations
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]
Value: TypeAlias = Callable[[Array], float]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def exact_k(logits: Array, noise: Array, k: int, tau: float) -> tuple[Array, Array, float]:
    """Hard mask, soft mask and threshold of section 2.3."""
    z = logits + noise
    ordered = sorted(z, reverse=True)
    threshold = (ordered[k - 1] + ordered[k]) / 2
    return (z > threshold).astype(float), sigmoid((z - threshold) / tau), threshold


def bernoulli(logits: Array, uniform: Array, tau: float) -> tuple[Array, Array]:
    """Hard and soft mask of logistic noise."""
    soft = sigmoid((logits + np.log(uniform) - np.log(1 - uniform)) / tau)
    return (soft > 0.5).astype(float), soft


def project(z: Array, k: float) -> Array:
    """Project onto the capped simplex by trying every interval of the shift between its breaks, exactly."""
    inside = np.clip(z, 0, 1)
    if inside.sum() <= k:
        return inside
    breaks = np.sort(np.concatenate([z, z - 1]))
    for low, high in pairwise(breaks):
        moved = z - (low + high) / 2
        free, ones = (moved > 0) & (moved < 1), (moved >= 1).sum()
        if not free.any() and ones == k:  # every shift of the interval does
            return np.clip(moved, 0, 1)
        if free.any():
            v = (z[free].sum() + ones - k) / free.sum()
            if low <= v <= high:
                return np.clip(z - v, 0, 1)
    raise AssertionError("no shift found")


def search(
    slope: Callable[[Array, int], Array], noises: Sequence[Array], k: int, *, lr: float, tau: float = 1.0
) -> Array:
    """Return the logits after exact-K steps with the given noise, by Adam as published (Kingma and Ba 2015)."""
    n = len(noises[0])
    logits, first, second = np.zeros(n), np.zeros(n), np.zeros(n)
    for step, noise in enumerate(noises):
        hard, soft, _ = exact_k(logits, noise, k, tau)
        w = hard / hard.sum()
        c = slope(w, step)
        gradient = (c - w @ c) / hard.sum() * soft * (1 - soft) / tau
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        corrected = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        logits = logits - lr * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    return logits


def softmax_search(slope: Callable[[Array, int], Array], n: int, *, iters: int, lr: float) -> Array:
    """Return the coefficients after descent in logits whose softmax they are, the Jacobian written out."""
    logits, first, second = np.zeros(n), np.zeros(n), np.zeros(n)
    for step in range(iters):
        c = np.exp(logits) / np.exp(logits).sum()
        gradient = (np.diag(c) - np.outer(c, c)) @ slope(c, step)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        logits = logits - lr * first / (1 - 0.9 ** (step + 1)) / (np.sqrt(second / (1 - 0.999 ** (step + 1))) + 1e-8)
    return np.exp(logits) / np.exp(logits).sum()


def expected_reinforce(logits: Array, k: int, loss: Callable[[frozenset[int]], float]) -> Array:
    """Slope of the expected loss of k drawn one by one, by summing over all orders; differences are numerical."""

    def expected(at: Array) -> float:
        total, p = 0.0, np.exp(at)
        for order in permutations(range(len(at)), k):
            chance, left = 1.0, p.sum()
            for i in order:
                chance, left = chance * p[i] / left, left - p[i]
            total += chance * loss(frozenset(order))
        return total

    h, unit = 1e-6, np.eye(len(logits))
    return np.array([(expected(logits + h * e) - expected(logits - h * e)) / (2 * h) for e in unit])


def subset(value: Value, n: int, k: int) -> tuple[int, ...]:
    """The best k of n by brute force."""
    return min(combinations(range(n), k), key=lambda chosen: value(mean(chosen, n)))


def mean(chosen: Sequence[int], n: int) -> Array:
    w = np.zeros(n)
    w[list(chosen)] = 1 / len(chosen)
    return w


def best(value: Value, n: int) -> Array:
    return min((mean([i], n) for i in reversed(range(n))), key=value)


def greedy(value: Value, n: int) -> Array:
    """Wortsman et al. 2022, Recipe 1."""
    order = sorted(range(n), key=lambda i: (value(mean([i], n)), -i))
    soup: list[int] = []
    for i in order:
        if not soup or value(mean([*soup, i], n)) <= value(mean(soup, n)):
            soup.append(i)
    return mean(soup, n)


def window(value: Value, n: int) -> Array:
    runs = [range(a, b) for length in range(n, 0, -1) for a in range(n - length, -1, -1) for b in [a + length]]
    return mean(min(runs, key=lambda run: value(mean(run, n))), n)


def simplex_minimum(points: Array, target: Array) -> Array:
    """Weights of the point of the points' hull nearest to a target, over all faces (small n)."""
    n, found = len(points), []
    for size in range(1, n + 1):
        for face in combinations(range(n), size):
            P = points[list(face)]
            system = np.block([[P @ P.T, np.ones((size, 1))], [np.ones((1, size)), np.zeros((1, 1))]])
            w = np.linalg.lstsq(system, np.append(P @ target, 1), rcond=None)[0][:size]
            if (w >= -1e-12).all():
                full = np.zeros(n)
                full[list(face)] = w
                found.append(full)
    return min(found, key=lambda w: float(((w @ points - target) ** 2).sum()))
