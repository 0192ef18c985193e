"""Tiny looped models of every host, with weights large enough that attention is far from uniform."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modicum.models import ZeroTokenConfig, ZeroTokenForCausalLM
from modicum.models.zero_token.hosts import TESTED

_SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HOSTS = {
    "llama": {"model_type": "llama", **_SIZES},
    "llama-tied-bias": {"model_type": "llama", **_SIZES, "tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {"model_type": "qwen2", **_SIZES},
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 8},
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 4},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 40,
        "n_embd": 16,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}


# Every host that is said to be tested, at the sizes above.
_OTHER = {
    "gemma2": {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4},
    "gemma3_text": {"head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4},
    "gemma": {"head_dim": 4},
    "gpt_neox": {"num_key_value_heads": None},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": 16, "num_key_value_heads": None, "intermediate_size": None},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {"head_dim": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "no_rope_layer_interval": 2},
}
ALL_HOSTS = HOSTS | {
    kind: {"model_type": kind, **{n: v for n, v in (_SIZES | _OTHER.get(kind, {})).items() if v is not None}}
    for kind in TESTED
    if kind not in HOSTS
}


def base_model(host="llama", seed=0, **overrides):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**ALL_HOSTS[host] | overrides))
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def looped(host="llama", seed=0, host_overrides=None, **knobs):
    settings = {"n_cycles": 3, "zero_key_init_std": 1.0} | knobs
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ZeroTokenForCausalLM(ZeroTokenConfig(host=ALL_HOSTS[host] | (host_overrides or {}), **settings))
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "cycle_gate", "cycle_embedding", ":B")):
                parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def tokens(b=2, t=7, seed=0):
    return torch.randint(3, 40, (b, t), generator=torch.Generator().manual_seed(seed))


def left_padded(input_ids, left):
    """Return ids, mask and positions with ``left`` padding tokens in front of the first sequence, none elsewhere."""
    b, t = input_ids.shape
    ids = torch.cat([torch.zeros(b, left, dtype=torch.long), input_ids], 1)
    mask = torch.ones(b, t + left, dtype=torch.long)
    mask[:, :left] = 0
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


def decode(model, input_ids, prefill=0, **knobs):
    """Run one token at a time after a first piece of ``prefill`` tokens; return logits, cycles and the cache."""
    cuts = ([prefill] if prefill else []) + [1] * (input_ids.shape[1] - prefill)
    cache, logits, cycles, start = None, [], [], 0
    with torch.no_grad():
        for width in cuts:
            out = model(input_ids[:, start : start + width], cache=cache, use_cache=True, **knobs)
            cache, start = out.cache, start + width
            logits.append(out.logits)
            cycles.append(out.cycles)
    return torch.cat(logits, 1), torch.cat(cycles, 1), cache
