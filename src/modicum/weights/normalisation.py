"""Statistics of batch normalisation for averaged weights, for which those of no checkpoint are right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from modicum.errors import RecipeError


@torch.no_grad()
def refresh_batch_norm(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], object] | None = None
) -> int:
    r"""Take running mean and variance of every batch normalisation anew, as plain means over ``batches``.

    .. math::
        \mu = \frac{1}{N} \sum_b \mu_b, \qquad \sigma^2 = \frac{1}{N} \sum_b \sigma^2_b

    Args:
        model: Changed in place; its modes and the layers' momenta are as before afterwards.
        batches: What the model is called with: a mapping as keywords, of a tuple or list the first element, anything
            else as it is. Tensors go to the device of the model.
        forward: ``(model, batch)`` calls the model in another way.

    Returns:
        The number of layers refreshed; 0 for a model without any, whose batches are then not looked at.

    Raises:
        RecipeError: There is a layer and no batch.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> refresh_batch_norm(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[3.0], [5.0]])])
        1
        >>> model.running_mean
        tensor([3.])

    Cost:
        One forward pass for each batch.

    Reference:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018,
        arXiv:1803.05407, Section 3.2.
    """
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not layers:
        return 0
    before = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers]
    device = next(iter(layers[0].buffers())).device
    count = 0
    try:
        model.eval()  # dropout and other layers stay out of it
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # a plain mean over the batches
            layer.train()
        for batch in batches:
            if forward is not None:
                forward(model, batch)
            else:
                _call(model, batch, device)
            count += 1
    finally:
        for module, training in before:
            module.training = training
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
    if not count:
        raise RecipeError("refresh_batch_norm got no batch, and the model has batch normalisation. Give some data.")
    return len(layers)


def _call(model: nn.Module, batch: Any, device: torch.device) -> None:
    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        model(**{key: moved(value) for key, value in batch.items()})
    else:
        model(moved(batch[0] if isinstance(batch, list | tuple) else batch))
