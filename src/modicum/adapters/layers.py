"""The LoRA layers inside a PEFT model, found by their attributes, because this file imports no PEFT.

A LoRA layer on a linear module holds ``lora_A[name].weight`` (rank, in) and ``lora_B[name].weight`` (out, rank). Layers
on embeddings and convolutions, and heads whose factors are an embedding's (``ensure_weight_tying``), are left at PEFT's
own start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from modicum import processes
from modicum.errors import ModicumError, UnsupportedError
from modicum.layout import ADAPTER_PREFIX

EXTRAS = ("use_dora", "lora_bias")  # parts that PEFT may add to the two factors


def lora_layers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Return the linear LoRA layers of ``adapter`` by the name of the module they wrap.

    Raises:
        UnsupportedError: The adapter is merged, or is more than two factors (DoRA, a bias, another variant).
        ModicumError: There is none.
    """
    found: dict[str, Any] = {}
    embedded = _embedded(model, adapter)
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    for name, layer in modules:
        if adapter not in getattr(layer, "lora_A", ()):
            continue
        _refuse_variants(name, layer, adapter)
        if _is_linear(layer, adapter, embedded):
            found[name.removeprefix(ADAPTER_PREFIX)] = layer
    if not found:
        raise ModicumError(
            f"The model has no linear LoRA layer of an adapter {adapter!r}. "
            "Wrap it with peft.get_peft_model and a LoraConfig first."
        )
    return found


def other_layers(model: nn.Module, adapter: str = "default") -> list[str]:
    """Return the names of the layers of ``adapter`` on embeddings, convolutions and heads tied to an embedding."""
    embedded = _embedded(model, adapter)
    modules: Iterable[tuple[str, Any]] = model.named_modules()
    return [
        name.removeprefix(ADAPTER_PREFIX)
        for name, layer in modules
        if adapter in getattr(layer, "lora_embedding_A", ())
        or (adapter in getattr(layer, "lora_A", ()) and not _is_linear(layer, adapter, embedded))
    ]


def _embedded(model: nn.Module, adapter: str) -> set[int]:
    """Return where the factors of adapters on embeddings lie in memory."""
    held = (getattr(layer, "lora_embedding_B", {}) for layer in model.modules())
    return {factors[adapter].data_ptr() for factors in held if adapter in factors} - {0}


def _is_linear(layer: Any, adapter: str, embedded: set[int]) -> bool:
    weight = layer.lora_A[adapter].weight
    # PEFT ties a head's factors to an embedding's as transposed views: one cannot be started without the other.
    return weight.ndim == 2 and weight.data_ptr() not in embedded


def factors_of(layer: Any, adapter: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return the parameters ``lora_A`` and ``lora_B`` of a layer."""
    return layer.lora_A[adapter].weight, layer.lora_B[adapter].weight


def whole(tensor: Tensor, name: str) -> Tensor:
    """Return a parameter's full value, gathered where FSDP2 has split it.

    Raises:
        UnsupportedError: It is a shard that only its owner can gather.
    """
    if hasattr(tensor, "full_tensor"):
        return tensor.full_tensor().detach()
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise UnsupportedError(f"{name} is a ZeRO-3 shard. Call this within deepspeed.zero.GatheredParameters.")
    return tensor.detach()


@torch.no_grad()
def store(parameter: Any, value: Tensor, name: str) -> None:
    """Copy ``value`` into a parameter, which stays the same object; every process gets that of the first.

    Raises:
        ModicumError: The shapes differ.
    """
    if parameter.shape != value.shape:
        raise ModicumError(f"{name} is {tuple(parameter.shape)}, but its start is {tuple(value.shape)}.")
    value = value.to(parameter.device, parameter.dtype).contiguous()
    processes.broadcast(value)
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def store_factors(layer: Any, adapter: str, factors: tuple[Tensor, Tensor], name: str) -> None:
    """Copy ``lora_A`` and ``lora_B`` into a layer; see :func:`store`."""
    for parameter, value in zip(factors_of(layer, adapter), factors):
        store(parameter, value, name)


def _refuse_variants(name: str, layer: Any, adapter: str) -> None:
    if layer.merged_adapters:
        raise UnsupportedError(f"{name}: an adapter is merged into the base. Call unmerge_adapter() first.")
    variant = next((option for option in EXTRAS if getattr(layer, option, {}).get(adapter)), None)
    if adapter in getattr(layer, "lora_E", ()):
        variant = "AdaLoRA"
    if variant is None and adapter in getattr(layer, "lora_variant", {}):
        variant = type(layer.lora_variant[adapter]).__name__
    if variant is not None:
        raise UnsupportedError(f"{name}: {variant} adapters cannot be started this way, only plain LoRA. Turn it off.")
