"""Parameters with given gradients, for tests of gradient rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

INITS = ["min", "mean", "ema", "last"]


def params_with(*grads: Any) -> list[torch.nn.Parameter]:
    params = []
    for grad in grads:
        tensor = torch.as_tensor(grad, dtype=torch.float32)
        param = torch.nn.Parameter(torch.zeros_like(tensor))
        param.grad = tensor.clone()
        params.append(param)
    return params


def feed(params: Sequence[torch.nn.Parameter], *grads: Any) -> None:
    for param, grad in zip(params, grads):
        param.grad = None if grad is None else torch.as_tensor(grad, dtype=param.dtype).clone()


def draw(
    seed: int,
    shapes: Sequence[tuple[int, ...]] = ((3, 4), (5,), (), (1,), (2, 2, 2)),
    dtype: torch.dtype = torch.float32,
) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=g, dtype=torch.float64).mul(10 ** (i - 1)).to(dtype)
        for i, shape in enumerate(shapes)
    ]
