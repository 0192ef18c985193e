"""Baselines of AdaGC in NumPy float64: each takes a whole series of inputs and returns that of outputs."""

from __future__ import annotations

import math

import numpy as np

EPS = 1e-6


def global_norm(totals, limit=1.0):
    return [min(1.0, limit / (g + EPS)) for g in totals]


def fixed_norm(norms, limit):
    return [0.0 if math.isinf(n) else min(1.0, limit / (n + EPS)) for n in norms]


def value(g, limit):
    return np.sign(g) * np.minimum(np.abs(g), limit)


def autoclip(totals, percentile=10.0):
    return [min(1.0, np.percentile(totals[: t + 1], percentile) / (g + EPS)) for t, g in enumerate(totals)]


def zclip(totals, z=2.5, decay=0.97, warmup=25, limit=1.0, eps=1e-6):
    out, mean, var = [], None, None
    for t, g in enumerate(totals):
        target = g
        if t >= warmup:
            sd = math.sqrt(var)
            score = (g - mean) / (sd + eps)
            if score > z:
                target = mean + z * sd / (score / z)
            mean = decay * mean + (1 - decay) * target
            var = decay * var + (1 - decay) * (target - mean) ** 2
        elif t == warmup - 1:
            mean, var = float(np.mean(totals[:warmup])), float(np.var(totals[:warmup]))
        target = min(target, limit)
        out.append(target / (g + EPS) if target < g else 1.0)
    return out


def skip_step(totals, sigma=6.0, window=128, minimum=64):
    out = []
    for t, g in enumerate(totals):
        past = totals[max(0, t - window) : t]
        enough = len(past) >= minimum
        out.append(0.0 if enough and g > np.mean(past) + sigma * np.std(past, ddof=1) else 1.0)
    return out


def aggc(
    norms,
    steps,
    decay=0.95,
    low=0.95,
    low_late=0.98,
    high=0.6,
    high_late=0.7,
    switch=0.4,
    transition=0.3,
    max_up=1.1,
    max_down=0.9,
    min_norm=0.01,
):
    out, average = [], 0.0
    for t, n in enumerate(norms):
        late = min(1.0, max(0.0, (t / steps - switch) / transition))
        upper = average * (high * (1 - late) + high_late * late)
        lower = max(min_norm, average * (low * (1 - late) + low_late * late))
        h = 1.0
        if upper > 0 and n > upper:
            h = max(upper / n, max_down)
        elif 0 < n < lower:
            h = min(lower / n, max_up)
        average = decay * average + (1 - decay) * h * n
        out.append(h)
    return out


def agc_factor(g, w, ratio=0.01, eps=1e-3):
    def rows(x):
        return np.sqrt(np.sum(x**2, axis=tuple(range(1, x.ndim)), keepdims=True)) if x.ndim > 1 else np.linalg.norm(x)

    length, limit = rows(g), ratio * np.maximum(rows(w), eps)
    return np.where(length > limit, limit / np.where(length > 0, length, 1), 1.0)


def clippy(u, w, g2=None, relative=0.1, absolute=1e-7, accumulator=0.0):
    worst = 1.0
    for j in range(u.size):
        allowed = relative * abs(w.flat[j]) + absolute + (accumulator / math.sqrt(g2.flat[j]) if accumulator else 0.0)
        if u.flat[j] != 0:
            worst = min(worst, allowed / abs(u.flat[j]))
    return worst


def spam(g, v, threshold=5000.0):
    out = g.copy()
    for j in range(g.size):
        if v.flat[j] > 0 and g.flat[j] ** 2 > threshold * v.flat[j]:
            out.flat[j] = np.sign(g.flat[j]) * math.sqrt(threshold * v.flat[j])
    return out


def stable_spam(series, norm_decay=0.7, square_decay=0.9, largest_decay=0.999, eps=1e-8):
    out, largest, norm, square = [], 0.0, 0.0, 0.0
    for t, g in enumerate(series, start=1):
        g = g.copy()
        top = np.abs(g).max()
        largest = largest_decay * largest + (1 - largest_decay) * top
        limit = largest / (1 - largest_decay**t)
        over = np.abs(g) > limit
        g[over] = g[over] / top * limit
        n = np.linalg.norm(g)
        norm = norm_decay * norm + (1 - norm_decay) * n
        square = square_decay * square + (1 - square_decay) * n * n
        scale = norm / (1 - norm_decay**t) / (math.sqrt(square / (1 - square_decay**t)) + eps)
        out.append(g / n * scale)
    return out


def stable_adamw(g, v, eps=1e-8):
    return 1 / max(1.0, math.sqrt(np.mean(g**2 / np.maximum(v, eps**2))))


def adafactor(u, lr, limit=1.0):
    return 1 / max(1.0, math.sqrt(np.mean((u / lr) ** 2)) / limit)


def trust_ratio(u, w, lr):
    a, b = np.linalg.norm(w), np.linalg.norm(u / lr)
    return a / b if a > 0 and b > 0 else 1.0
