"""What a looped model must know of its host: which class it is, where its layers are, what is inside a layer.

Everything else (embeddings, masks, positions, norms, scalings, heads) stays the host's own code.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.pytorch_utils import Conv1D

from modicum.errors import UnsupportedError
from modicum.layout import LAYER_LISTS

_MAPPINGS = {
    "base": auto.MODEL_MAPPING,
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "token": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
}


# Fields with an entry for each layer; some are a number where all layers agree.
_BY_LAYER = LAYER_LISTS | {"layer_rope_theta", "moe_topk", "num_experts", "num_attention_heads_per_layer"}


def of_layers(config: PreTrainedConfig, name: str, layers: Iterable[int]) -> Any:
    """Return what a field of ``config`` says of these layers, in this order; unchanged where it says it of no layer."""
    value = getattr(config, name)
    listed = name in _BY_LAYER and isinstance(value, (list, tuple)) and len(value) >= config.num_hidden_layers
    return [value[layer] for layer in layers] if listed else value


def keep_lists(config: PreTrainedConfig, layers: Sequence[int]) -> None:
    """Give ``config`` the entries of these layers alone, in this order."""
    for name in _BY_LAYER:
        if getattr(config, name, None) is not None:
            setattr(config, name, of_layers(config, name, layers))


def host_class(config: PreTrainedConfig, kind: str) -> type[PreTrainedModel]:
    """Return the host's class with the head ``kind``: ``base``, ``causal``, ``sequence`` or ``token``."""
    found = _MAPPINGS[kind].get(type(config), None)
    if found is None:
        raise UnsupportedError(f"transformers has no {kind} model of the type {config.model_type!r}.")
    return found[0] if isinstance(found, tuple) else found


def kind_of(model: PreTrainedModel) -> str:
    """Return which head ``model`` has."""
    for kind in ("causal", "sequence", "token", "base"):
        if type(model.config) in _MAPPINGS[kind] and isinstance(model, host_class(model.config, kind)):
            return kind
    raise UnsupportedError(
        f"A {type(model).__name__} cannot be looped. Give a model for causal language modelling, for sequence or token "
        "classification, or one without head."
    )


def check_config(config: PreTrainedConfig) -> None:
    """Refuse architectures whose layers are no plain visits of attention, by what their configuration says.

    Raises:
        UnsupportedError: The layers do more than attend and pass a state on.
    """
    if config.is_heterogeneous:  # it says nothing of all layers then, and asking it is an error
        raise refused(config, "its layers are of several sizes (per_layer_config)")
    reasons = {
        "layers of its own for an encoder": getattr(config, "is_encoder_decoder", False),
        "attention in both directions": type(config) in auto.MODEL_FOR_MASKED_LM_MAPPING,
        "several parts (loop the text model alone)": hasattr(config, "text_config"),
        "layers that read each other's keys": getattr(config, "num_kv_shared_layers", 0),
        "compressed keys and values": getattr(config, "kv_lora_rank", None),
        "attention with reorder_and_upcast_attn": getattr(config, "reorder_and_upcast_attn", False),
        "cross-attention": getattr(config, "add_cross_attention", False),
        "layers that are dropped at random (set layerdrop to 0)": getattr(config, "layerdrop", 0),
    }
    plain = {"full_attention", "sliding_attention", "chunked_attention"}
    kinds = set(getattr(config, "layer_types", None) or ())
    reasons["layers without attention"] = kinds - plain or not hasattr(config, "num_attention_heads")
    found = [reason for reason, holds in reasons.items() if holds]
    if found or type(config) not in auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise refused(config, f"it has {found[0]}" if found else "it is no decoder")


def refused(config: PreTrainedConfig, why: str) -> UnsupportedError:
    """Return the error that names a host that cannot be looped, and those that can."""
    tested = ", ".join(TESTED)
    return UnsupportedError(f"A {config.model_type!r} model cannot be looped: {why}. Tested hosts: {tested}.")


# Hosts for which every feature is tested; other decoders are compared with themselves when they are converted.
TESTED = (
    "cohere", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2",
    "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
)  # fmt: skip


def find_layers(model: PreTrainedModel, n_layers: int) -> tuple[PreTrainedModel, str]:
    """Return the module that runs the layers, and the name by which it holds them.

    Raises:
        UnsupportedError: There is no such list, or there are several.
    """
    found: list[tuple[PreTrainedModel, str]] = [
        (module, name)
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == n_layers and all(map(_attends, child))
    ]
    if len(found) != 1:
        raise refused(model.config, f"it has {len(found)} lists of {n_layers} layers with attention, expected one")
    return found[0]


def layers_path(model: PreTrainedModel) -> str:
    """Return the name of the list of layers, as it stands in the names of ``model``'s tensors."""
    body, name = find_layers(model, model.config.num_hidden_layers)
    return next(f"{path}.{name}".lstrip(".") for path, module in model.named_modules() if module is body)


def _attentions(block: nn.Module) -> list[nn.Module]:
    return [child for child in block.children() if "attention" in type(child).__name__.lower()]


def _attends(block: nn.Module) -> bool:
    return len(_attentions(block)) == 1


def attention_of(block: nn.Module) -> nn.Module:
    """Return the attention of a layer."""
    return _attentions(block)[0]


def feed_forward_of(block: nn.Module) -> nn.Module:
    """Return the feed-forward part of a layer.

    Raises:
        UnsupportedError: There is none, or there are several. A linear map of the layer itself is none: an adapter
            would stand around it, and what it adds would not be gated.
    """
    words = ("mlp", "moe", "feedforward", "experts")
    others = ("norm", "attention", "router")  # every class of some hosts has "Moe" in its name
    classes = {child: type(child).__name__.lower() for child in block.children()}
    named = [c for c, name in classes.items() if _has(name, words) and not _has(name, others)]
    if len(named) != 1:
        raise UnsupportedError(
            f"{type(block).__name__} has {len(named)} modules for its feed-forward part, and ffn_gate closes one. "
            "Leave ffn_gate out."
        )
    return named[0]


def _has(name: str, words: tuple[str, ...]) -> bool:
    return any(word in name for word in words)


def zero_key_shape(host: PreTrainedConfig) -> tuple[int, int]:
    """Return the number of key-value heads and their width."""
    heads = host.num_attention_heads
    groups = getattr(host, "num_key_value_heads", None) or heads
    return groups, getattr(host, "head_dim", None) or host.hidden_size // heads


def normed_key(attention: nn.Module, key: Tensor) -> Tensor:
    """Return the zero keys (g, k) as the host norms its keys; unchanged where it does not."""
    norm = next((c for name, c in attention.named_children() if name.startswith(("k_norm", "k_layernorm"))), None)
    if norm is None:
        return key
    weights: list[Any] = list(norm.parameters())
    if weights and weights[0].dim() == 1 and weights[0].numel() == key.numel():
        return norm(key.flatten()).view_as(key)  # the norm spans all heads
    if isinstance(getattr(norm, "norms", None), nn.ModuleList):
        return norm(key[None, :, None])[0, :, 0]  # a norm for each head
    return norm(key)


def rotation_of(attention: nn.Module) -> Any:
    """Return the function by which the host turns queries and keys.

    Raises:
        UnsupportedError: The host has no rotary positions.
    """
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        raise UnsupportedError(
            f"zero_key_rope: relative needs rotary positions, which {type(attention).__name__} does not have."
        )
    return turn


def rotated_key(attention: nn.Module, key: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return the zero keys turned by each query's own position (b, g, t, k), as the host turns its keys.

    Raises:
        UnsupportedError: The host has no rotary positions, or turns a part of the head alone.
    """
    turn = rotation_of(attention)
    if rotary is None or rotary[0].shape[-1] != key.shape[-1]:
        raise UnsupportedError(
            f"zero_key_rope: relative needs rotary positions over the whole head, which {type(attention).__name__} "
            "does not have. Use zero_key_rope: none."
        )
    spread = key[None, :, None].expand(rotary[0].shape[0], -1, rotary[0].shape[1], -1)
    turned: Tensor = turn(spread, spread, *rotary)[1]
    return turned


def linear_maps(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps of a layer by name, less those that return more than their product (some routers)."""
    return {name: module for name, module in layer.named_modules() if type(module) in (nn.Linear, Conv1D)}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear map."""
    weight: Any = module.weight
    return tuple(weight.shape) if isinstance(module, Conv1D) else tuple(weight.shape[::-1])


def scale_residual_init(layers: nn.ModuleList, config: PreTrainedConfig, visits: int) -> None:
    """Scale fresh residual outputs to the logical depth, where the host draws them for its physical one."""
    if config.model_type != "gpt2":
        return
    factor = (len(layers) / visits) ** 0.5
    with torch.no_grad():
        for block in layers:
            for name, parameter in block.named_parameters():
                if name.endswith("c_proj.weight"):
                    parameter.mul_(factor)
