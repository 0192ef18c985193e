"""Data for initialisations: gradients at the frozen weights, and second moments of the layers' inputs.

Both are averaged over the batches and over the processes, each of which brings its own share of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from modicum import processes
from modicum.adapters.layers import lora_layers
from modicum.adapters.preheat import Batch, Loss, own_loss
from modicum.errors import ModicumError, UnsupportedError


def base_weight(layer: Any, name: str) -> Tensor:
    """Return the frozen weight under a LoRA layer as (out, in), a view of it.

    Raises:
        UnsupportedError: It is quantised.
    """
    weight: Tensor = layer.get_base_layer().weight
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        raise UnsupportedError(f"{name} is quantised; this start needs full-precision weights. Use hrp or default.")
    return weight.T if layer.fan_in_fan_out else weight


def weight_gradients(
    peft_model: Any, batches: Iterable[Batch], *, adapter: str = "default", loss: Loss | None = None
) -> dict[str, Tensor]:
    """Return the loss' gradient at the frozen weight of every LoRA layer, as (out, in) in float32.

    Args:
        peft_model: A PEFT model; its adapters are off meanwhile.
        batches: Mappings of tensors that the model takes.
        adapter: Whose layers to look at.
        loss: ``(model, batch) -> scalar``; the model's own when not given.

    Raises:
        ModicumError: There are no batches, or a module saw no gradient.
        UnsupportedError: A weight is quantised.
    """
    layers = lora_layers(peft_model, adapter)
    weights = {name: base_weight(layer, name) for name, layer in layers.items()}
    leaves = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    with _quiet(peft_model, train=True), peft_model.disable_adapter():
        for parameter in peft_model.parameters():
            parameter.requires_grad_(False)
        for leaf in leaves.values():
            leaf.requires_grad_(True)
            leaf.grad = None
        try:
            count = 0
            for batch in batches:
                (loss or own_loss)(peft_model, batch).backward()  # type: ignore[no-untyped-call]
                count += 1
            found = {name: leaf.grad for name, leaf in leaves.items()}
        finally:
            for leaf in leaves.values():
                leaf.grad = None
    _check_seen(count, [name for name, gradient in found.items() if gradient is None])
    turned = {name: gradient.T if weights[name] is not leaves[name] else gradient for name, gradient in found.items()}
    return _averaged({name: gradient.float() / count for name, gradient in turned.items()})


def input_moments(peft_model: Any, batches: Iterable[Batch], *, adapter: str = "default") -> dict[str, Tensor]:
    """Return the second moment of the inputs of every LoRA layer, (in, in) in float32, padding left out.

    Args:
        peft_model: A PEFT model; its adapters are off meanwhile.
        batches: Mappings of tensors; ``attention_mask``, where there is one, says what is padding.
        adapter: Whose layers to look at.

    Raises:
        ModicumError: There are no batches, or a module saw no input.
    """
    layers = lora_layers(peft_model, adapter)
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = dict.fromkeys(layers, 0)
    mask: list[Tensor | None] = [None]

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen = inputs[0].detach()
            keep = mask[0]
            if keep is not None and keep.shape == seen.shape[:-1]:
                seen = seen[keep.bool()]
            seen = seen.reshape(-1, seen.shape[-1]).float()
            sums[name] = sums[name] + seen.T @ seen if name in sums else seen.T @ seen
            rows[name] += len(seen)

        return hook

    handles = [layer.get_base_layer().register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    count = 0
    try:
        with _quiet(peft_model, train=False), peft_model.disable_adapter(), torch.no_grad():
            for batch in batches:
                mask[0] = batch.get("attention_mask")
                peft_model(**batch)
                count += 1
    finally:
        for handle in handles:
            handle.remove()
    _check_seen(count, [name for name in layers if not rows[name]])
    return _averaged({name: sums[name] / rows[name] for name in layers})


@contextmanager
def _quiet(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Put flags, modes and the global generator back afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    model.train(train)
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


def _check_seen(count: int, unseen: list[str]) -> None:
    if count == 0:
        raise ModicumError("There are no calibration batches. Give some, or raise the size of the data.")
    if unseen:
        raise ModicumError(f"{unseen[0]} was not reached by any calibration batch. Exclude it or give other data.")


def _averaged(found: dict[str, Tensor]) -> dict[str, Tensor]:
    for value in found.values():
        processes.average([value])  # one message each: a joined one would double the memory
    return found
