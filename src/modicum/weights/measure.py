r"""What methods weigh experts by, measured on data: squared gradients and Gram matrices, a batch at a time.

Sums are kept for the tensors that are asked for and nothing else, so a caller bounds the memory by asking for few at a
time. They are in float32; in float64 where more than 4096 terms enter an entry, whose rounding would add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

LONG = 4096  # terms of a sum


def squared_gradients(
    log_likelihood: Callable[[Any], Tensor], parameters: Mapping[str, Tensor], examples: Iterable[Any], *, count: int
) -> dict[str, Tensor]:
    r"""Return the diagonal of the Fisher information.

    .. math::
        F_i = \frac1N \sum_x \Big(\frac{\partial \log p(y_x \mid x)}{\partial \theta_i}\Big)^2

    Args:
        log_likelihood: Of one example: of all its labels together, not their mean.
        parameters: The tensors whose gradients are taken, by name.
        examples: One at a time: squares of the gradient of a batch are something else.
        count: How many there are (N).

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> squared_gradients(lambda x: (w * x).sum(), {"w": w}, [1.0, 3.0], count=2)
        {'w': tensor([5., 5.])}
    """
    dtype = torch.float64 if count > LONG else torch.float32
    sums = {name: torch.zeros_like(tensor, dtype=dtype) for name, tensor in parameters.items()}
    for example in examples:
        with torch.enable_grad():
            value = log_likelihood(example)
        found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
        for total, gradient in zip(sums.values(), found):
            if gradient is not None:
                wide = gradient.to(dtype)
                total.addcmul_(wide, wide)
    return {name: total.div_(count).float() for name, total in sums.items()}


def gram_matrices(
    forward: Callable[[Any], object], layers: Mapping[str, nn.Linear], batches: Iterable[Any], *, count: int
) -> dict[str, Tensor]:
    r"""Return the Gram matrix of each layer's inputs, over all rows of all batches.

    .. math::
        G = X^T X

    Args:
        forward: Computes the model on a batch, which holds no padding.
        layers: The layers, by the names of their weights.
        batches: The data.
        count: How many rows enter a layer altogether.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> gram_matrices(layer, {"weight": layer}, [torch.eye(2), torch.ones(1, 2)], count=3)
        {'weight': tensor([[2., 1.],
                [1., 2.]])}
    """
    dtype = torch.float64 if count > LONG else torch.float32
    sums = {
        name: torch.zeros(layer.in_features, layer.in_features, dtype=dtype, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def watch(total: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            total.add_(rows.T @ rows)

        return add

    handles = [layer.register_forward_pre_hook(watch(sums[name])) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total.float() for name, total in sums.items()}
