"""Where the host architectures keep their parts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modicum.errors import UnsupportedError
from modicum.models.zero_token.visit import ATTENTION


@dataclass(frozen=True)
class Host:
    """Names of a host's parts, as its checkpoints spell them."""

    prefix: str
    layers: str
    norm: str
    embedding: str
    attention: str


_LLAMA = Host("model", "layers", "norm", "embed_tokens", "self_attn")
_GPT2 = Host("transformer", "h", "ln_f", "wte", "attn")


def host_of(config: PreTrainedConfig) -> Host:
    """Return where ``config``'s architecture keeps its parts."""
    return _GPT2 if config.model_type == "gpt2" else _LLAMA


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the host without head, its attention going through ours."""
    if getattr(config, "reorder_and_upcast_attn", False) or getattr(config, "add_cross_attention", False):
        raise UnsupportedError("reorder_and_upcast_attn and add_cross_attention are not supported. Set them to false.")
    backbone = AutoModel.from_config(copy.deepcopy(config), attn_implementation=ATTENTION)
    backbone.config._attn_implementation_internal = ATTENTION
    return backbone


def embed(backbone: Any, inputs_embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return the first state and the arguments that every layer takes."""
    if backbone.config.model_type == "gpt2":
        return backbone.drop(inputs_embeds + backbone.wpe(position_ids)), {}
    rotary = backbone.rotary_emb(inputs_embeds, position_ids=position_ids)
    return inputs_embeds, {"position_embeddings": rotary, "position_ids": position_ids}


def linear_maps(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps of a layer by name."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Return (in, out) of a linear map."""
    weight: Any = module.weight
    return tuple(weight.shape) if isinstance(module, Conv1D) else tuple(weight.shape[::-1])


def scale_residual_init(backbone: Any, visits: int) -> None:
    """Scale fresh residual outputs to the logical depth, where the host draws them for its physical one."""
    if backbone.config.model_type != "gpt2":
        return
    factor = (backbone.config.n_layer / visits) ** 0.5
    with torch.no_grad():
        for block in backbone.h:
            block.attn.c_proj.weight.mul_(factor)
            block.mlp.c_proj.weight.mul_(factor)
