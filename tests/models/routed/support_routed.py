"""Small hosts of several architectures, and experts of them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modicum.models.routed import RoutedForCausalLM, route_experts
from modicum.models.router import fit_router
from modicum.weights.mediator import build_experts, units_of

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4}
LLAMA = SIZES | {"num_hidden_layers": 3, "num_key_value_heads": 2, "max_position_embeddings": 64, "eos_token_id": 39}
HOSTS: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"tie_word_embeddings": True},
    "qwen2": LLAMA,
    "qwen3": LLAMA | {"head_dim": 4},
    "mistral": LLAMA | {"sliding_window": 8},
    "gpt2": {"vocab_size": 40, "n_embd": 16, "n_head": 4, "n_layer": 3, "n_positions": 64, "eos_token_id": 39},
}


def host(kind: str = "llama", seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, pad_token_id=0, **HOSTS[kind])
        return AutoModelForCausalLM.from_config(config).eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a checkpoint holds: a tied head is none of them."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name not in tied}


def experts_of(kind: str = "llama", n: int = 3, scale: float = 0.05) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    base = weights_of(host(kind))
    rng = torch.Generator().manual_seed(7)
    return base, [{k: t + scale * torch.randn(t.shape, generator=rng) for k, t in base.items()} for _ in range(n)]


def routed(kind: str = "llama", *, layers: slice = slice(None), router: bool = True, **knobs: Any) -> RoutedForCausalLM:
    """Return a routed model whose router sends prompts of small, middle and large tokens to the three experts."""
    base, experts = experts_of(kind)
    knobs = {"sparsifier": "sign", **knobs}
    built = build_experts(base, experts, list(units_of(base))[layers], **knobs)
    model = route_experts(host(kind), built)
    if router:
        rng = torch.Generator().manual_seed(1)
        prompts = torch.cat([torch.randint(12 * t + 1, 12 * t + 13, (20, 6), generator=rng) for t in range(3)])
        model.router = fit_router(model.features(prompts), [t for t in range(3) for _ in range(20)])
    return model


def prompts(n: int = 3, length: int = 5, seed: int = 2) -> torch.Tensor:
    """Return prompts that belong to the experts in turn."""
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randint(12 * (i % 3) + 1, 12 * (i % 3) + 13, (length,), generator=rng) for i in range(n)]
    return torch.stack(rows)
