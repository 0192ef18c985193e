"""Submodular coordination in NumPy, one set and one agent at a time, by enumeration wherever that is possible."""

from __future__ import annotations

import math
from functools import cache
from itertools import product

import numpy as np


def facility(V, weights=None):
    V = np.asarray(V, float)
    w = np.ones(len(V)) if weights is None else np.asarray(weights, float)

    def f(elements):
        elements = list(elements)
        return float(w @ V[:, elements].max(1)) if elements else 0.0

    return f


def coverage(P, weights=None):
    P = np.asarray(P, float)
    w = np.ones(len(P)) if weights is None else np.asarray(weights, float)
    return lambda elements: float(w @ (1 - np.prod(1 - P[:, list(elements)], axis=1)))


def concave(S, weights=None, phi="sqrt", tau=None):
    S = np.asarray(S, float)
    w = np.ones(len(S)) if weights is None else np.asarray(weights, float)
    phis = {"sqrt": np.sqrt, "log1p": np.log1p, "min": lambda s: np.minimum(s, tau)}
    return lambda elements: float(w @ phis[phi](S[:, list(elements)].sum(1)))


def gain(f, elements, a):
    rest = set(elements) - {a}
    return f(rest | {a}) - f(rest)


def curvature(f, n):
    everything = set(range(n))
    shares = [gain(f, everything, a) / f({a}) for a in range(n) if f({a}) > 0]
    return 1 - min(shares, default=1.0)


@cache
def all_values(f, n):
    """Every subset as a row of 0 and 1, and its value."""
    taken = list(product((0, 1), repeat=n))
    return np.array(taken), np.array([f([a for a, t in enumerate(row) if t]) for row in taken])


def multilinear(f, x):
    taken, values = all_values(f, len(x))
    return float(np.where(taken, x, 1 - np.asarray(x, float)).prod(1) @ values)


def multilinear_grad(f, x):
    slopes = []
    for a in range(len(x)):
        up, down = np.array(x, float), np.array(x, float)
        up[a], down[a] = 1, 0
        slopes.append(multilinear(f, up) - multilinear(f, down))
    return np.array(slopes)


def scales(c, nodes=16):
    z, w = np.polynomial.legendre.leggauss(nodes)
    z, w = (z + 1) / 2, w / 2
    return zip(z, w * np.exp(c * (z - 1)))


def surrogate_grad(f, x, c):
    return sum(w * multilinear_grad(f, z * np.asarray(x)) for z, w in scales(c))


def policy_value(f, x, blocks, scale=1.0):
    """Expected value where every agent draws one action of its block, or none."""
    total = 0.0
    for choice in product(*([None, *block] for block in blocks)):
        chance = 1.0
        for block, a in zip(blocks, choice):
            inside = scale * sum(x[b] for b in block)
            chance *= 1 - inside if a is None else scale * x[a]
        if chance:
            total += chance * f([a for a in choice if a is not None])
    return total


def spl_grad(f, x, blocks, agent):
    """Gradient of agent's own actions at its copy x."""
    n = len(x)
    others = [block if other != agent else [] for other, block in enumerate(blocks)]
    result = []
    for a in blocks[agent]:

        def added(elements, a=a):
            return gain(f, elements, a)

        integral = sum(w * policy_value(added, x, others, z) for z, w in scales(1.0, 20))
        result.append(integral + gain(f, range(n), a) / math.e)
    return np.array(result)


def project(v):
    v = np.asarray(v, float)
    if np.maximum(v, 0).sum() <= 1:
        return np.maximum(v, 0)
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - high, 0)


def kl_step(y, g, eta):
    s = np.asarray(y, float) * np.exp(eta * np.asarray(g, float))
    return s / max(1.0, s.sum())


def start(blocks, init):
    n = sum(map(len, blocks))
    x = np.zeros((len(blocks), n))
    for i in range(len(blocks)):
        for j, block in enumerate(blocks):
            if init == "all" or i == j:
                x[i, block] = 1 / len(block)
    return x


def gossip(f, x, blocks, W, *, eta, kind="ma_osma", c=1.0, gamma=0.0, mix="per_block", consensus="paper",
           surrogate=True, grad_at="x"):  # fmt: skip
    """One round of MA-OSMA, MA-OSEA or MA-SPL with exact gradients; returns the new copies."""
    message = x.copy()
    if kind == "ma_osea":
        u = np.full(x.shape[1], 1 / x.shape[1])
        if mix == "per_block":
            for block in blocks:
                u[block] = 1 / len(block)
        message = (1 - gamma) * x + gamma * u
    y = np.array([sum(W[i][j] * message[j] for j in range(len(blocks))) for i in range(len(blocks))])
    new = y.copy()
    for i, block in enumerate(blocks):
        point = x[i] if grad_at == "x" else y[i]
        own = message[i, block] if consensus == "owner" else y[i, block]
        if kind == "ma_spl":
            g = spl_grad(f, point, blocks, i)
        else:
            g = (surrogate_grad(f, point, c) if surrogate else multilinear_grad(f, point))[block]
        new[i, block] = kl_step(own, g, eta) if kind == "ma_osea" else project(own + eta * g)
    return new


def metropolis(adjacency):
    A = np.asarray(adjacency)
    N = len(A)
    W = np.zeros((N, N))
    for i in range(N):
        for j in range(N):
            if i != j and A[i][j]:
                W[i, j] = 1 / (1 + max(A[i].sum(), A[j].sum()))
        W[i, i] = 1 - W[i].sum()
    return W


def sequential(f, blocks, order=None):
    chosen = {}
    for i in range(len(blocks)) if order is None else order:
        gains = [gain(f, chosen.values(), a) for a in blocks[i]]
        chosen[i] = blocks[i][int(np.argmax(gains))]
    return [blocks[i].index(chosen[i]) for i in range(len(blocks))]


def greedy(f, n, k):
    picks = []
    for _ in range(k):
        left = [a for a in range(n) if a not in picks]
        picks.append(max(left, key=lambda a: (round(gain(f, picks, a), 12), -a)))
    return picks


def optimum(f, blocks):
    return max(product(*blocks), key=lambda choice: f(choice))


class OSG:
    def __init__(self, blocks, T, scale=1.0, order=None):
        self.blocks, self.T, self.scale = blocks, T, scale
        self.order = list(range(len(blocks))) if order is None else order
        self.J = math.ceil(math.log2(T))
        self.p = [[np.full(len(b), 1 / len(b)) for _ in range(self.J)] for b in blocks]
        self.q = [np.full(self.J, 1 / self.J) for _ in blocks]

    def probabilities(self):
        return np.concatenate([sum(q * p for q, p in zip(self.q[i], self.p[i])) for i in range(len(self.blocks))])

    def update(self, f, actions):
        before = set()
        for i in self.order:
            block = self.blocks[i]
            most = max(f({a}) for a in block)
            loss = np.array([-gain(f, before, a) / most if most else 0.0 for a in block])
            trust = np.empty(self.J)
            for j in range(self.J):
                rate = self.scale * math.sqrt(math.log(len(block) * self.T) / 2**j)
                meta = self.scale * math.sqrt(math.log(self.J) / self.T)
                trust[j] = self.q[i][j] * math.exp(-meta * (self.p[i][j] @ loss))
                v = self.p[i][j] * np.exp(-rate * loss)
                v = v.sum() / self.T / len(block) + (1 - 1 / self.T) * v
                self.p[i][j] = v / v.sum()
            self.q[i] = trust / trust.sum()
            before.add(block[actions[i]])


class BSG(OSG):
    def __init__(self, blocks, T, scale=1.0, order=None):
        super().__init__(blocks, T, scale, order)
        self.J = max(1, math.ceil(math.log(T)))
        self.p = [[np.full(len(b), 1 / len(b)) for _ in range(self.J)] for b in blocks]
        self.q = [np.full(self.J, 1 / self.J) for _ in blocks]

    def update(self, f, actions):
        most = max(f({a}) for block in self.blocks for a in block)
        before = set()
        for i in self.order:
            block, played = self.blocks[i], actions[i]
            loss = 1 - gain(f, before, block[played]) / most
            chance = sum(q * p for q, p in zip(self.q[i], self.p[i]))[played]
            trust = np.empty(self.J)
            for j in range(self.J):
                rate = self.scale * math.sqrt(math.log(len(block) * self.T) / (2**j * len(block)))
                estimate = np.zeros(len(block))
                estimate[played] = loss / (chance + rate / 2)
                meta = self.scale * math.sqrt(math.log(self.J) / (2 * self.T))
                trust[j] = self.q[i][j] * math.exp(-meta * (self.p[i][j] @ estimate))
                v = self.p[i][j] * np.exp(-rate * estimate)
                share = 1 / (self.T - 1)
                v = share * v.sum() / len(block) + (1 - share) * v
                self.p[i][j] = v / v.sum()
            self.q[i] = trust / trust.sum()
            before.add(block[played])


def rag(f, blocks, W):
    decided = {}
    N = len(blocks)
    near = [[j for j in range(N) if j != i and W[i][j] > 0] for i in range(N)]
    while len(decided) < N:
        best = {}
        for i in range(N):
            if i not in decided:
                known = [blocks[j][decided[j]] for j in near[i] if j in decided]
                gains = [gain(f, known, a) for a in blocks[i]]
                best[i] = (max(gains), int(np.argmax(gains)))
        winners = [i for i in best if all((best[i][0], -i) > (best[j][0], -j) for j in near[i] if j in best)]
        for i in winners:
            decided[i] = best[i][1]
    return [decided[i] for i in range(N)]


def responses(f, blocks, actions):
    result = []
    for i, block in enumerate(blocks):
        others = [blocks[j][a] for j, a in enumerate(actions) if j != i and a >= 0]
        result.append(int(np.argmax([gain(f, others, a) for a in block])))
    return result
