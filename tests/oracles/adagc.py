"""AdaGC in NumPy float64, one tensor at a time, as the published pseudo-code says it."""

from __future__ import annotations

import math

import numpy as np


class AdaGC:
    """The rule on whole gradients; ``gamma`` is a dictionary from position to the running scale."""

    def __init__(
        self,
        relative=1.04,
        absolute=1.0,
        beta=0.99,
        warmup=100,
        init="min",
        eps=1e-8,
        init_beta=0.9,
        observe="clipped",
        ignore_zero=True,
    ):
        self.relative, self.absolute, self.beta, self.warmup = relative, absolute, beta, warmup
        self.init, self.eps, self.init_beta = init, eps, init_beta
        self.observe, self.ignore_zero = observe, ignore_zero
        self.gamma: dict[int, float] = {}
        self.history: dict[int, list[float]] = {}
        self.t = 0

    def step(self, grads):
        """Return the scaled gradients; ``None`` stays ``None``."""
        self.t += 1
        norms = [None if g is None else math.sqrt(float(np.sum(np.asarray(g, dtype=np.float64) ** 2))) for g in grads]
        total = math.sqrt(sum(n * n for n in norms if n is not None and math.isfinite(n)))
        out = []
        for i, (g, n) in enumerate(zip(grads, norms)):
            if g is None:
                out.append(None)
            elif not math.isfinite(n):
                out.append(np.zeros_like(g))
            else:
                out.append(self._factor(i, n, total) * np.asarray(g, dtype=np.float64))
        return out

    def _factor(self, i, n, total):
        observable = n > 0 or not self.ignore_zero
        if self.t <= self.warmup:
            h = min(1.0, self.absolute / (total + self.eps)) if total + self.eps > 0 else 1.0
            if observable:
                self.history.setdefault(i, []).append(h * n if self.observe == "clipped" else n)
                self.gamma[i] = self._estimate(self.history[i])
            return h
        if i not in self.gamma:
            if observable:
                self.gamma[i] = n
            return 1.0
        gamma = self.gamma[i]
        h = 1.0 if n == 0 else min(1.0, self.relative * gamma / (n + self.eps))
        if observable:
            self.gamma[i] = self.beta * gamma + (1 - self.beta) * min(n, self.relative * gamma)
        return h

    def _estimate(self, seen):
        if self.init == "min":
            return min(seen)
        if self.init == "mean":
            return sum(seen) / len(seen)
        if self.init == "last":
            return seen[-1]
        value = seen[0]
        for n in seen[1:]:
            value = self.init_beta * value + (1 - self.init_beta) * n
        return value
