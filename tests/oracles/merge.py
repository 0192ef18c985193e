"""Merge methods in plain float64 NumPy, one function each, after the equations of their papers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


# From here on: one method each, with the formulas of the methods' docstrings.


def combine(parts: Array, scale: float, weights: Sequence[float], how: str, normalize: bool) -> Array:
    """Add sparsified deltas, or add those of the elected sign."""
    if how == "ties":
        return scale * elect(parts, weights, normalize)
    total = sum(w * part for w, part in zip(weights, parts))
    return scale * total / (sum(weights) if normalize else 1.0)


def l1(kept: Array, delta: Array) -> Array:
    """Give what was kept of a delta the sum of magnitudes of the whole."""
    held = np.abs(kept).sum()
    return kept * (np.abs(delta).sum() / held if held else 1.0)


def dare(
    base: Array,
    experts: Sequence[Array],
    masks: Sequence[Array],
    density: float,
    rescale: str = "expectation",
    how: str = "none",
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
) -> Array:
    """Yu et al. 2024, Equation 1, with given masks."""
    kept = [mask * delta for mask, delta in zip(masks, deltas(base, experts))]
    if rescale == "expectation":
        kept = [part / density for part in kept]
    elif rescale == "l1":
        kept = [l1(part, delta) for part, delta in zip(kept, deltas(base, experts))]
    return base + combine(np.stack(kept), scale, weights or [1.0] * len(experts), how, normalize)


def keep_probability(delta: Array, density: float, epsilon: float) -> Array:
    """Deep et al. 2024: linear in the rank of a magnitude within its row, equals sharing their mean."""
    width = delta.shape[-1] if delta.ndim else 1
    rows = np.abs(delta).reshape(-1, width)
    pairs = rows[:, :, None], rows[:, None, :]
    rank = (np.greater(*pairs).sum(2) + (np.greater_equal(*pairs).sum(2) - 1)) / 2
    window = 2 * epsilon * rank / (width - 1) - epsilon if width > 1 else np.zeros_like(rows)
    return (density + window).reshape(delta.shape)


def della(
    base: Array,
    experts: Sequence[Array],
    masks: Sequence[Array],
    density: float,
    epsilon: float,
    rescale: str = "probability",
    how: str = "ties",
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Array:
    """Deep et al. 2024, Section 3, with given masks."""
    kept = []
    for mask, delta in zip(masks, deltas(base, experts)):
        part = mask * delta
        if rescale == "probability":
            part = part / keep_probability(delta, density, epsilon)
        elif rescale == "l1":
            part = l1(part, delta)
        kept.append(part)
    return base + combine(np.stack(kept), scale, weights or [1.0] * len(experts), how, normalize)


def breadcrumbs(
    base: Array,
    experts: Sequence[Array],
    density: float,
    gamma: float,
    how: str = "none",
    scale: float = 1.0,
    weights: Sequence[float] | None = None,
    normalize: bool = False,
) -> Array:
    """Davari and Belilovsky 2024: neither the largest nor the smallest magnitudes of a tensor."""
    kept = max(1, int(density * base.size))
    top = min(int(gamma * base.size), base.size - kept)
    parts = [trim(d, top + kept) - (trim(d, top) if top else 0) for d in deltas(base, experts)]
    return base + combine(np.stack(parts), scale, weights or [1.0] * len(experts), how, normalize)


def cosine(a: Array, b: Array) -> float:
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return float((a * b).sum() / norms) if norms else 0.0


def model_stock(base: Array, experts: Sequence[Array], clamp: bool = True) -> Array:
    """Jang et al. 2024, Equation 2, with the mean cosine over pairs."""
    taus, n = deltas(base, experts), len(experts)
    mean = np.mean([cosine(taus[i], taus[j]) for i in range(n) for j in range(i + 1, n)])
    pole = 1 + (n - 1) * mean
    t = n * mean / pole if pole > 1e-6 else 0.0
    t = min(1.0, max(0.0, t)) if clamp else t
    return t * np.mean(np.stack(experts), 0) + (1 - t) * base


def model_stock_rows(base: Array, experts: Sequence[Array], clamp: bool = True) -> Array:
    """The same with a t for each row."""
    if not base.ndim:
        return model_stock(base, experts, clamp)
    width = base.shape[-1]
    rows = zip(base.reshape(-1, width), *(e.reshape(-1, width) for e in experts))
    return np.stack([model_stock(row[0], list(row[1:]), clamp) for row in rows]).reshape(base.shape)


def nearswap(base: Array, expert: Array, t: float) -> Array:
    """Weigh the expert by t over the difference, at most 1."""
    difference = np.abs(expert - base)
    weight = np.where(difference > t, t / np.where(difference > 0, difference, 1), 1.0)
    return weight * expert + (1 - weight) * base


def arcee_fusion(base: Array, expert: Array) -> Array:
    """Replace the entries whose |delta| times the row's divergence lies above the fence."""
    a, b = np.atleast_1d(base), np.atleast_1d(expert)
    scores = np.zeros_like(a)
    for place in np.ndindex(a.shape[:-1]):
        p, q = (np.exp(row - row.max()) / np.exp(row - row.max()).sum() + 1e-8 for row in (b[place], a[place]))
        scores[place] = np.abs(b[place] - a[place]) * max(0.0, float((p * np.log(p / q)).sum()))
    ordered = np.sort(scores, axis=None)
    low, middle, high = (ordered[int(share * (ordered.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(scores >= middle + 1.5 * (high - low), b, a).reshape(base.shape)


def slerp(a: Array, b: Array, t: float, straight: float = 0.9995) -> Array:
    """Shoemake 1985, Section 3.3; on the line where the cosine's magnitude exceeds ``straight``."""
    c = cosine(a, b)
    if abs(c) > straight or not np.any(a) or not np.any(b):
        return (1 - t) * a + t * b
    angle = np.arccos(c)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def nuslerp(
    base: Array | None, experts: Sequence[Array], weights: Sequence[float], flatten: bool, row_wise: bool
) -> Array:
    """Interpolate the two tensors, or their deltas: whole, by rows or by columns."""
    origin = np.zeros_like(experts[0]) if base is None else base
    a, b = (expert - origin for expert in experts)
    t = weights[1] / sum(weights)
    if flatten or a.ndim < 2:
        return origin + slerp(a, b, t, 1 - 1e-15)
    if not row_wise:
        a, b = np.swapaxes(a, -1, -2), np.swapaxes(b, -1, -2)
    out = np.empty_like(a)
    for row in np.ndindex(a.shape[:-1]):
        out[row] = slerp(a[row], b[row], t, 1 - 1e-15)
    return origin + (out if row_wise else np.swapaxes(out, -1, -2))


def towards(center: Array, unit: Array) -> Array:
    """Buss and Fillmore 2001: the tangent vector at ``center`` that leads to ``unit``."""
    ahead = unit - (unit @ center) * center
    length = np.linalg.norm(ahead)
    return np.arctan2(length, unit @ center) / length * ahead if length > 1e-15 else 0 * center


def along(center: Array, tangent: Array) -> Array:
    angle = np.linalg.norm(tangent)
    return np.cos(angle) * center + (np.sin(angle) / angle * tangent if angle else 0)


def spherical_mean(vectors: Sequence[Array], weights: Sequence[float], rounds: int) -> Array:
    """Buss and Fillmore 2001, Algorithm A1: ``rounds`` steps from the normalised mean of the directions."""
    flat = [vector.reshape(-1) for vector in vectors]
    norms = [np.linalg.norm(vector) for vector in flat]
    if not any(norms):
        return np.zeros_like(vectors[0])
    live = [(w, vector / norm) for w, vector, norm in zip(weights, flat, norms) if norm]
    center = sum(w * unit for w, unit in live)
    center = center / np.linalg.norm(center)
    for _ in range(rounds):
        center = along(center, sum(w * towards(center, unit) for w, unit in live))
    return (sum(w * norm for w, norm in zip(weights, norms)) * center).reshape(vectors[0].shape)


def consensus(base: Array, experts: Sequence[Array], threshold: float, agree: int, scale: float) -> Array:
    """Wang et al. 2024, Sections 4 and 5."""
    taus = deltas(base, experts)
    total = taus.sum(0)
    masks = np.stack([np.abs(tau) > threshold * np.abs(total - tau) for tau in taus])
    return base + scale * total * (masks.sum(0) >= agree)


def min_max(values: Array) -> Array:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else 0 * values


def pcb(base: Array, experts: Sequence[Array], ratio: float, scale: float) -> Array:
    """Du et al. 2024, Section 3, on one tensor."""
    taus = deltas(base, experts)
    scores = []
    for tau in taus:
        size = np.abs(tau)
        low, high = (np.quantile(size, q, method="inverted_cdf") for q in (1e-4, 1 - 1e-4))
        score = np.exp(len(taus) * min_max(np.clip(size, low, high)) ** 2) * np.tanh(tau * taus.sum(0))
        scores.append(min_max(np.maximum(score, np.quantile(score, 1 - ratio, method="inverted_cdf"))))
    weight = sum(scores)
    total = sum(score * tau for score, tau in zip(scores, taus))
    return base + scale * np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)


def unified(taus: Array) -> Array:
    """Huang et al. 2024: the largest magnitude among the deltas of the elected sign; a sum of zero elects minus."""
    sign = np.where(taus.sum(0) > 0, 1.0, -1.0)
    return sign * np.max(np.where(taus * sign > 0, np.abs(taus), 0.0), 0)


def emr(base: Array, experts: Sequence[Array], expert: int | None) -> Array:
    """Huang et al. 2024, Section 3, on one tensor."""
    taus = deltas(base, experts)
    shared = unified(taus)
    if expert is None:
        return base + shared
    own = shared * (taus[expert] * shared > 0)
    held = np.abs(own).sum()
    return base + (np.abs(taus[expert]).sum() / held if held else 0.0) * own


def magmax(base: Array, experts: Sequence[Array], scale: float) -> Array:
    """Marczak et al. 2024, Section 4; of equal magnitudes the later expert's."""
    taus = deltas(base, experts)[::-1]
    return base + scale * np.take_along_axis(taus, np.abs(taus).argmax(0)[None], 0)[0]


def sce(base: Array, experts: Sequence[Array], select: float) -> Array:
    """Wan et al. 2024, Section 3.3."""
    taus = deltas(base, experts)
    if select < 1 and len(experts) > 1:
        variance = taus.var(0)
        mask = trim(variance, max(1, int(select * np.count_nonzero(variance)))) > 0
        taus = taus * mask
    energy = np.array([(tau**2).mean() for tau in taus])
    weights = energy / energy.sum() if energy.sum() else np.full(len(energy), 1 / len(energy))
    sign = np.where(taus.sum(0) >= 0, 1.0, -1.0)
    agree = taus * sign > 0
    divisor = np.tensordot(weights, agree, 1)
    total = np.tensordot(weights, taus * agree, 1)
    return base + np.divide(total, divisor, out=np.zeros_like(total), where=divisor > 0)


def ram(base: Array, experts: Sequence[Array], eps: float, r: float, alpha: float) -> Array:
    """Yuan et al. 2026: unique changes whole, shared ones averaged."""
    taus = deltas(base, experts)
    changed = np.abs(taus) > eps
    count = changed.sum(0)
    out = np.zeros_like(base)
    for tau, mine in zip(taus, changed):
        unique, shared = (mine & (count == 1)).sum(), (mine & (count > 1)).sum()
        stronger = 1 + r * min(alpha, shared / unique if unique else 0.0)
        out = out + np.where(mine, tau, 0.0) * np.where(count == 1, stronger, 1.0) / np.maximum(count, 1)
    return base + out


def fisher(experts: Sequence[Array], information: Sequence[Array], weights: Sequence[float], floor: float) -> Array:
    """Matena and Raffel 2022, Equation 4."""
    parts = [w * np.maximum(f, floor) for w, f in zip(weights, information)]
    return sum(part * expert for part, expert in zip(parts, experts)) / sum(parts)


def regmean(experts: Sequence[Array], grams: Sequence[Array], shrink: float) -> Array:
    """Jin et al. 2023, Equations 2 and 3."""
    hats = [shrink * gram + (1 - shrink) * np.diag(np.diag(gram)) for gram in grams]
    return sum(expert @ hat for expert, hat in zip(experts, hats)) @ np.linalg.inv(sum(hats))


# Methods for matrices: a function of the deltas of one matrix.


def by_matrix(base: Array, experts: Sequence[Array], merge: Callable[[list[Array]], Array]) -> Array:
    """Apply a method for matrices to each matrix of a tensor; vectors and scalars get the mean of the deltas."""
    if base.ndim < 2:
        return base + deltas(base, experts).mean(0)
    if base.ndim > 2:
        return np.stack([by_matrix(base[i], [e[i] for e in experts], merge) for i in range(len(base))])
    return base + merge([expert - base for expert in experts])
