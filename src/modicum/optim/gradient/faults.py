"""Faults put into a training run on purpose, to see which rule survives them.

Whether a step is hit, and where, depends on the seed and the step alone, so all arms of a study meet the same faults.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from modicum.random import derive_seed, generator


def is_hit(probability: float, *names: str | int, seed: int) -> bool:
    """Tell whether the event called ``names`` happens.

    Example:
        >>> is_hit(1.0, "noise", 3, seed=0), is_hit(0.0, "noise", 3, seed=0)
        (True, False)
    """
    return derive_seed(seed, "is_hit", *names) / 2**63 < probability


@torch.no_grad()
def tensor_noise_(
    grads: Sequence[Tensor], *, step: int, seed: int = 0, probability: float = 0.02, scale: float = 1000.0
) -> int | None:
    """Add noise of ``scale`` times its own standard deviation to one random gradient, in a share of the steps.

    Args:
        grads: Gradients of all tensors; changed in place.
        step: The optimiser step.
        seed: Seed of the faults.
        probability: Share of steps that are hit.
        scale: Standard deviation of the noise, in those of the gradient.

    Returns:
        Position of the gradient that was hit, or ``None``.

    Example:
        >>> grads = [torch.tensor([1.0, -1.0])]
        >>> tensor_noise_(grads, step=0, probability=1.0)
        0
        >>> bool(grads[0].abs().max() > 10)
        True
    """
    if not is_hit(probability, "tensor_noise", step, seed=seed):
        return None
    place = derive_seed(seed, "tensor_noise_place", step) % len(grads)
    grad = grads[place]
    # Drawn on the CPU, so that every device gets the same fault.
    noise = torch.randn(grad.shape, generator=generator(seed, "tensor_noise", step)).to(grad.device, grad.dtype)
    deviation = grad.std(correction=0) if grad.numel() > 1 else grad.abs().mean()
    grad.add_(noise * deviation * scale)
    return place


@torch.no_grad()
def loss_burst_(
    grads: Sequence[Tensor], *, step: int, seed: int = 0, probability: float = 0.02, scale: float = 100.0
) -> bool:
    """Multiply all gradients, as a loss that many times too large would, in a share of the steps.

    Example:
        >>> grads = [torch.ones(2)]
        >>> loss_burst_(grads, step=0, probability=1.0, scale=3.0), grads
        (True, [tensor([3., 3.])])
    """
    hit = is_hit(probability, "loss_burst", step, seed=seed)
    if hit:
        for grad in grads:
            grad.mul_(scale)
    return hit


def bad_batch(
    input_ids: Int[Tensor, "b t"], *, vocabulary: int, step: int, seed: int = 0, probability: float = 0.02
) -> Int[Tensor, "b t"]:
    """Return random tokens instead of the batch, in a share of the steps.

    Example:
        >>> bad_batch(torch.zeros(1, 4, dtype=torch.long), vocabulary=9, step=0, probability=0.0)
        tensor([[0, 0, 0, 0]])
    """
    if not is_hit(probability, "bad_batch", step, seed=seed):
        return input_ids
    rng = generator(seed, "bad_batch", step)
    return torch.randint(vocabulary, input_ids.shape, generator=rng).to(input_ids.device, input_ids.dtype)
