"""What ``config.json`` says beyond the tensors: two models of the same shapes may still compute otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from modicum.layout import DEPTH_KEYS, LAYER_LISTS

# The same matrices are other heads under another number of these.
HEADS = frozenset({"num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim"})
# Settings of training, storage and generation, which do not change what the weights compute. The sizes of tensors are
# compared tensor by tensor, and whether embeddings are tied shows in the names.
_IMMATERIAL = frozenset(
    {
        "_name_or_path", "_commit_hash", "architectures", "auto_map", "model_type", "transformers_version",
        "torch_dtype", "dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
        "output_router_logits", "router_aux_loss_coef", "gradient_checkpointing", "initializer_range",
        "initializer_factor", "attention_dropout", "hidden_dropout", "attn_pdrop",
        "embd_pdrop", "resid_pdrop", "pretraining_tp", "id2label", "label2id",
        "problem_type", "task_specific_params", "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id",
        "sep_token_id", "decoder_start_token_id", "vocab_size", "tie_word_embeddings", "unsloth_version",
        *DEPTH_KEYS, *LAYER_LISTS,
    }
)  # fmt: skip


def differences(
    one: Mapping[str, Any], other: Mapping[str, Any], *, heads: bool = False
) -> dict[str, tuple[object, object]]:
    """Return the settings that both configurations have, with different values.

    Args:
        one: A configuration.
        other: Another.
        heads: Look at the numbers of heads only, instead of all other settings that matter.

    Example:
        >>> differences({"rms_norm_eps": 1e-5, "use_cache": True}, {"rms_norm_eps": 1e-6, "use_cache": False})
        {'rms_norm_eps': (1e-05, 1e-06)}
    """
    a, b = flatten(one), flatten(other)
    return {
        key: (a[key], b[key]) for key in a if key in b and a[key] != b[key] and _is_asked(key.rpartition(".")[2], heads)
    }


def _is_asked(key: str, heads: bool) -> bool:
    return key in HEADS if heads else key not in HEADS | _IMMATERIAL


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with one name for each setting: nested ones dotted, rotary ones as in transformers 5.

    Example:
        >>> flatten({"rope_theta": 1e4, "rope_scaling": {"type": "linear"}, "text_config": {"n_head": 2}})
        {'rope_parameters.rope_theta': 10000.0, 'rope_parameters.rope_type': 'linear', 'text_config.n_head': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        place = {"rope_theta": "rope_parameters.rope_theta", "rope_scaling": "rope_parameters"}.get(key, key)
        if isinstance(value, Mapping):
            rotary = place == "rope_parameters"
            inner = {"rope_type" if rotary and name == "type" else name: item for name, item in value.items()}
            flat |= {f"{place}.{name}": item for name, item in (inner if rotary else flatten(inner)).items()}
        elif value is not None:
            flat[place] = value
    if "rope_parameters.rope_theta" in flat:
        flat.setdefault("rope_parameters.rope_type", "default")
    return flat
