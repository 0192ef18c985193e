r"""Logistic regression with an L2 penalty: the probe of hidden states, and the small guard.

It is small, exact and has no random start, so that a probe's answer never depends on an optimiser's luck.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from modicum.errors import RecipeError


class Probe(NamedTuple):
    """A linear classifier: the log-odds of a row ``x`` are ``x @ weight + bias``."""

    weight: Tensor
    bias: float

    def __call__(self, x: Tensor) -> Tensor:
        """Return the log-odds of each row."""
        return x.to(self.weight.dtype) @ self.weight + self.bias


def fit(x: Tensor, labels: Tensor, *, l2: float = 1.0, iterations: int = 100) -> Probe:
    r"""Return the minimum of the penalised log-loss, by Newton's method with step halving.

    .. math:: \sum_i \log(1 + e^{-y_i (w^\top x_i + b)}) + \tfrac{\lambda}{2} \lVert w \rVert^2, \qquad y_i = \pm 1

    Args:
        x: Rows, (n, d).
        labels: Whether each row is of the second class, (n,).
        l2: :math:`\lambda`, above 0. The bias is free.
        iterations: Most Newton steps; the minimum is unique and takes about ten.

    Returns:
        The classifier in float64.

    Raises:
        RecipeError: A class is missing, ``l2`` is not positive or a value is not finite.

    Example:
        >>> probe = fit(torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.tensor([False, False, True, True]))
        >>> (probe(torch.tensor([[0.0], [3.0]])) > 0).tolist()
        [False, True]

    Cost:
        A Gram matrix and a few solves of order min(n, d).

    Reference:
        D. R. Cox, 1958, for the model; C. M. Bishop, "Pattern Recognition and Machine Learning", 2006, section 4.3.3.
    """
    rows, signs = x.to(torch.float64), labels.to(torch.bool)
    if not bool(signs.any()) or bool(signs.all()):
        raise RecipeError(f"All {len(signs)} rows are of one class, expected some of both.")
    if not l2 > 0 or not bool(rows.isfinite().all()):
        raise RecipeError(f"l2 is {l2} and all rows must be finite, expected a positive number and finite rows.")
    # The weight lies in the span of the rows: with more columns than rows the problem has the rows' number of unknowns.
    basis = None
    if rows.shape[1] > rows.shape[0]:
        rows, basis = _coordinates(rows)
    design = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    y = torch.where(signs, 1.0, -1.0).to(torch.float64)
    penalty = torch.full((design.shape[1],), float(l2), dtype=torch.float64)
    penalty[-1] = 0.0
    w = design.new_zeros(design.shape[1])

    def loss(at: Tensor) -> float:
        return float(torch.nn.functional.softplus(-y * (design @ at)).sum() + (penalty * at * at).sum() / 2)

    now = loss(w)
    for _ in range(iterations):
        share = torch.sigmoid(design @ w)
        gradient = design.T @ (share - signs.to(torch.float64)) + penalty * w
        hessian = design.T @ ((share * (1 - share))[:, None] * design) + torch.diag(penalty)
        # Far out all shares are 0 or 1 and the bias has no curvature left.
        hessian.diagonal()[-1].add_(1e-12 * len(rows))
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while size > 1e-8 and not (after := loss(w - size * step)) <= now:
            size /= 2
        if size <= 1e-8 or math.isclose(after, now, rel_tol=1e-13, abs_tol=1e-14):
            break
        w, now = w - size * step, after
    weight = w[:-1] if basis is None else basis.T @ w[:-1]
    return Probe(weight, float(w[-1]))


def auroc(scores: Tensor, labels: Tensor) -> float:
    """Return the probability that a row of the second class scores above one of the first; ties count half.

    Example:
        >>> auroc(torch.tensor([0.1, 0.9, 0.5]), torch.tensor([False, True, True]))
        1.0

    Raises:
        RecipeError: A class is missing.

    Reference:
        J. A. Hanley, B. J. McNeil, Radiology 1982.
    """
    positive, negative = scores[labels].to(torch.float64), scores[~labels].to(torch.float64)
    if not len(positive) or not len(negative):
        raise RecipeError(f"{len(positive)} rows of one class and {len(negative)} of the other, expected some of both.")
    ordered = negative.sort().values
    below = torch.searchsorted(ordered, positive).to(torch.float64)
    upto = torch.searchsorted(ordered, positive, right=True).to(torch.float64)
    return float((below + upto).sum() / 2 / (len(positive) * len(negative)))


def _coordinates(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in an orthonormal basis of their span, and the basis (n, d)."""
    q, r = torch.linalg.qr(rows.T)
    return r.T, q.T
