"""Merge methods of matrices, transcribed in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from oracles.merge import Array, polar, task_arithmetic, ties


def tsv_delta(taus: Sequence[Array], ranks: Sequence[int], weights: Sequence[float], rtol: float) -> Array:
    """Gargiulo et al. 2025, Algorithm 1, with a rank and a factor on the singular values of each expert.

    Directions of singular value zero are left out, and directions of a stack below the cut-off.
    """
    stacks: tuple[list[Array], list[Array], list[Array]] = ([], [], [])
    for tau, rank, weight in zip(taus, ranks, weights):
        U, S, Vt = np.linalg.svd(tau, full_matrices=False)
        live = [i for i in range(rank) if S[i] > 1e-6 * S[0]]
        for stack, part in zip(stacks, (U[:, live], weight * S[live], Vt[live].T)):
            stack.append(part)
    U, S, V = (np.concatenate(stack, axis=-1) for stack in stacks)
    return polar(U, rtol) @ np.diag(S) @ polar(V, rtol).T if S.size else np.zeros_like(taus[0])


def interference(taus: Sequence[Array], rank: int) -> float:
    """Gargiulo et al. 2025: the entrywise L1 norm of (UᵀU − I) Σ (VᵀV − I)."""
    parts = [np.linalg.svd(tau, full_matrices=False) for tau in taus]
    U = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    S = np.concatenate([s[:rank] for _, s, _ in parts])
    V = np.concatenate([v[:rank].T for _, _, v in parts], 1)
    one = np.eye(S.size)
    return float(np.abs((U.T @ U - one) @ np.diag(S) @ (V.T @ V - one)).sum())


def outlier_weights(
    taus: Sequence[Array], mode: str, sigmas: float, bounds: tuple[float, float] | None, normalize: str
) -> list[float]:
    """Our definition of RESM's weights."""
    n, scores = len(taus), []
    for tau in taus:
        a = np.abs(tau)
        over = a > a.mean() + sigmas * a.std()
        scores.append({"mass": a[over].sum(), "ratio": a[over].sum() / (a.sum() or 1.0), "count": over.mean()}[mode])
    if normalize == "softmax":
        weights = n * np.exp(scores) / np.exp(scores).sum()
    else:
        weights = n * np.array(scores) / sum(scores) if sum(scores) else np.ones(n)
    if bounds:
        weights = np.clip(weights, *bounds)
    weights = n * weights / weights.sum()
    return list(weights / n if normalize == "sum1" else weights)


def dense_share(tau: Array, c: float, eps: float | None) -> float:
    a = np.abs(tau)
    return float((a > (c * a.mean() if eps is None else eps)).mean())


def iso_c_delta(total: Array, scale: float) -> Array:
    """Marczak et al. 2025, Algorithm 1; directions in which the sum is zero stay zero."""
    U, S, Vt = np.linalg.svd(total, full_matrices=False)
    live = 1e-6 * S[0] < S
    return scale * S.mean() * U[:, live] @ Vt[live]


def iso_cts_delta(taus: Sequence[Array], scale: float, common: float) -> Array:
    """Marczak et al. 2025, Algorithm 2."""
    n, r = len(taus), min(taus[0].shape)
    own = min(round((r - int(r * common)) / n), r // n)
    shared = r - own * n
    Uc, Sc, Vtc = np.linalg.svd(sum(taus), full_matrices=False)
    rests = [tau - Uc[:, :shared] @ Uc[:, :shared].T @ tau for tau in taus]
    parts = [[u[:, :own], s[:own], v[:own]] for u, s, v in (np.linalg.svd(x, full_matrices=False) for x in rests)]
    parts.append([Uc[:, :shared], Sc[:shared], Vtc[:shared]])
    strongest = max((s.max() for _, s, _ in parts if s.size), default=0.0)
    if not strongest:
        return np.zeros_like(taus[0])
    U = np.concatenate([u[:, s > 1e-6 * strongest] for u, s, _ in parts], 1)
    V = np.concatenate([v[s > 1e-6 * strongest].T for _, s, v in parts], 1)
    return scale * np.concatenate([s for _, s, _ in parts]).mean() * polar(U, 1e-12) @ polar(V, 1e-12).T


def wudi_delta(taus: Sequence[Array], ridge: float) -> Array:
    """Cheng et al. 2025, Equation 8, as one least squares problem with a pull towards the sum."""
    live = [tau for tau in taus if tau.any()]
    if not live:
        return np.zeros_like(taus[0])
    columns = np.concatenate([tau.T / np.linalg.norm(tau) for tau in live], 1)
    wanted = np.concatenate([tau @ tau.T / np.linalg.norm(tau) for tau in live], 1)
    pull = np.sqrt(ridge * (columns**2).sum() / len(columns))
    left = np.concatenate([columns, pull * np.eye(len(columns))], 1)
    right = np.concatenate([wanted, pull * sum(taus)], 1)
    return np.linalg.lstsq(left.T, right.T)[0].T


def opcm_delta(taus: Sequence[Array], alpha: float, scale: float) -> Array:
    """Tang et al. 2025: in the full singular bases of what is merged, drop the leading block and the diagonal."""
    merged, factor, norms = taus[0], 1.0, [np.linalg.norm(taus[0])]
    for t, tau in enumerate(taus[1:], 2):
        U, S, Vt = np.linalg.svd(merged)
        leading = 1 + int((np.cumsum(S) < alpha * S.sum()).sum())
        inside = U.T @ tau @ Vt.T
        # Vectors of singular value zero are arbitrary, so nothing is dropped along them.
        live = 1e-6 * S[0] < S
        inside[:leading, :leading] *= ~np.outer(live[:leading], live[:leading])
        for i in np.flatnonzero(live):
            inside[i, i] = 0
        norms.append(np.linalg.norm(tau))
        total = factor * merged + U @ inside @ Vt
        factor = np.linalg.norm(total) / (sum(norms) / t) if sum(norms) else 1.0
        merged = total / factor if factor else total
    return scale * merged


def svc_delta(taus: Sequence[Array], alpha: float, scale: float) -> Array:
    """Spectral over-accumulation, 2026: each direction of the sum divided by the mean of its projections."""
    total = sum(taus)
    U, S, Vt = np.linalg.svd(total, full_matrices=False)
    for r in range(S.size):
        mine = U[:, r] @ total
        votes = []
        for tau in taus:
            theirs = U[:, r] @ tau
            energy = theirs @ theirs
            if energy > 1e-12 * S[0] ** 2:
                votes.append(max(alpha, mine @ theirs / energy))
        S[r] = S[r] / np.mean(votes) if votes else 0.0
    return scale * U @ np.diag(S) @ Vt


def knots_delta(taus: Sequence[Array], inner: str, density: float, scale: float, weights: Sequence[float]) -> Array:
    """Stoica et al. 2025, Section 4, trimmed within the matrix."""
    U, S, _ = np.linalg.svd(np.concatenate(taus, 1), full_matrices=False)
    U = U[:, 1e-6 * S[0] < S]
    if not U.shape[1]:
        return np.zeros_like(taus[0])
    inside = [U.T @ tau for tau in taus]
    zero = np.zeros_like(inside[0])
    merge = task_arithmetic(zero, inside, scale, weights) if inner == "task_arithmetic" else ties(
        zero, inside, [density] * len(taus), scale, weights
    )  # fmt: skip
    return U @ merge
