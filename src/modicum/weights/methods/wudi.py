"""The delta that interferes least with every expert's inputs, estimated from the deltas themselves (WUDI).

Needs no scale. ``closed_form`` solves exactly what the paper's Adam steps approach.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from modicum.registry import merge_method
from modicum.types import Positive, PositiveInt
from modicum.weights.kernels.matrices import merge_matrices


@merge_method("wudi", paper="arXiv:2503.08099", laws={"permutation", "zero_delta", "shift"}, matrix=True)
def wudi(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    solver: Literal["closed_form", "adam"] = "closed_form",
    ridge: Positive = 1e-6,
    steps: PositiveInt = 300,
    lr: Positive = 1e-5,
) -> Tensor:
    r"""Minimise the interference of the merged delta with the rows of each expert's.

    .. math::
        \min_\tau \sum_t \frac{\|(\tau - \tau_t)\, \tau_t^T\|_F^2}{\|\tau_t\|_F^2}, \quad
        \tau \sum_t C_t = \sum_t \tau_t C_t, \quad C_t = \frac{\tau_t^T \tau_t}{\|\tau_t\|_F^2}

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        solver: ``closed_form`` solves the normal equations, ``adam`` descends from the sum of the deltas as published.
        ridge: Regularisation of the normal equations towards the sum of the deltas, relative to the mean eigenvalue.
        steps: Steps of Adam.
        lr: Learning rate of Adam.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Example:
        >>> import torch
        >>> a, b = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 3.0]))
        >>> wudi(torch.zeros(2, 2), [a, b]).round(decimals=3)
        tensor([[2., 0.],
                [0., 3.]])

    Cost:
        One solve of the input side, in float64; Adam ``steps`` times two products of the matrix with each expert's.

    Deviates:
        The closed form and its ridge are ours; the paper takes Adam steps, whose early stop is its regularisation.

    Reference:
        Cheng et al., "Whoever Started the Interference Should End It: Guiding Data-Free Model Merging via Task
        Vectors", ICML 2025, arXiv:2503.08099, Equation 8.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        wide = [delta.double() for delta in deltas]
        total = torch.stack(wide).sum(0)
        grams = [d.T @ d / d.square().sum() for d in wide if d.any()]
        if not grams:
            return torch.zeros_like(deltas[0])
        live = [d for d in wide if d.any()]
        summed = torch.stack(grams).sum(0)
        target = sum((d @ gram for d, gram in zip(live, grams)), torch.zeros_like(total))
        if solver == "adam":
            return _descend(total, summed, target, steps, lr).to(deltas[0].dtype)
        strength = ridge * float(summed.diagonal().mean())
        left = summed + strength * torch.eye(len(summed), dtype=summed.dtype, device=summed.device)
        return torch.linalg.solve(left, target + strength * total, left=False).to(deltas[0].dtype)

    return merge_matrices(base, experts, merge)


def _descend(start: Tensor, gram: Tensor, target: Tensor, steps: int, lr: float) -> Tensor:
    """Take Adam's steps on the quadratic whose gradient is ``2 (τ · gram − target)``."""
    delta, first, second = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        gradient = 2 * (delta @ gram - target)
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.001)
        scaled = (second / (1 - 0.999**step)).sqrt_().add_(1e-8)
        delta -= lr * (first / (1 - 0.9**step)) / scaled
    return delta
