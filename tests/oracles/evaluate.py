"""Slow, independent versions of the estimators: quantiles by integration and bisection, limits by search."""

from __future__ import annotations

import math

import numpy as np


def normal_quantile(p: float) -> float:
    """Invert the normal distribution function by bisection."""
    return _invert(lambda x: 0.5 * (1 + math.erf(x / math.sqrt(2))), p)


def student_quantile(p: float, freedom: int) -> float:
    """Invert Student's distribution function, integrated with Simpson's rule after x = tan(u)."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def below(x: float) -> float:
        u = np.linspace(0, math.atan(abs(x)), 4001)
        y = constant * (1 + np.tan(u) ** 2 / freedom) ** (-(freedom + 1) / 2) * (1 + np.tan(u) ** 2)
        weights = np.ones_like(u)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        half = float((weights * y).sum() * (u[1] - u[0]) / 3)
        return 0.5 + math.copysign(half, x)

    return _invert(below, p)


def _invert(function, p: float) -> float:
    low, high = -1e3, 1e3
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < p else (low, middle)
    return (low + high) / 2


def wilson(successes: int, n: int, level: float) -> tuple[float, float]:
    """Find the proportions that a score test at this level just accepts: (p̂ − p)² = z² p (1 − p) / n."""
    z, p = normal_quantile(0.5 + level / 2), successes / n
    roots = np.roots([1 + z * z / n, -(2 * p + z * z / n), p * p]).real
    return float(min(roots)), float(max(roots))


def ratio(x, y, level: float) -> tuple[float, float, float]:
    """Return the ratio of the sums with its linearised Student interval."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    n, value = len(x), x.sum() / y.sum()
    scaled = (x - value * y) / y.mean()
    half = student_quantile(0.5 + level / 2, n - 1) * scaled.std(ddof=1) / math.sqrt(n)
    return value, value - half, value + half


def paired_proportions(a, b, level: float) -> tuple[float, float]:
    """Build the four cells, add a half to each, and take the Wald interval of the difference."""
    cells = np.full((2, 2), 0.5)
    for x, y in zip(a, b, strict=True):
        cells[int(x), int(y)] += 1
    shares = cells / cells.sum()
    difference = shares[1].sum() - shares[:, 1].sum()
    variance = (shares[1, 0] + shares[0, 1] - difference**2) / cells.sum()
    half = normal_quantile(0.5 + level / 2) * math.sqrt(variance)
    return max(difference - half, -1.0), min(difference + half, 1.0)


def document_nats(next_token_probabilities, tokens, size: int, stride: int) -> float:
    """Score token after token: each with the longest context that the window which scores it holds.

    Args:
        next_token_probabilities: From a list of tokens to the distribution of the next one.
        tokens: The document.
        size: Tokens of a window.
        stride: Tokens by which it moves on.
    """
    total, window_end = 0.0, min(size, len(tokens))
    for position in range(1, len(tokens)):
        while position >= window_end:
            window_end = min(window_end + stride, len(tokens))
        start = max(window_end - size, 0)
        total -= math.log(next_token_probabilities(tokens[start:position])[tokens[position]])
    return total


PUNCTUATION = set("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


def squad(text: str) -> str:
    """Normalise as SQuAD's script does: case, then punctuation, then articles, then white space."""
    words = "".join(c for c in text.lower() if c not in PUNCTUATION).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def edges(text: str) -> str:
    """Cut punctuation and space off both ends, one character after the other."""
    text = " ".join(text.split()).lower()
    while text and text[0] in " \"'`*.,:;!":
        text = text[1:]
    while text and text[-1] in " \"'`*.,:;!":
        text = text[:-1]
    return text
