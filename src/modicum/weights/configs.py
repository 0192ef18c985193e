"""What ``config.json`` says beyond the tensors: two models of the same shapes may still compute otherwise."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from modicum.layout import DEPTH_KEYS, LAYER_LISTS, VOCABULARY_SIZES

# The same matrices are other heads under another number of these.
HEADS = frozenset({"num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "head_dim"})
_TEXT = ("text_config", "llm_config", "language_config")  # of models of text and more
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
    found = {key: (a[key], b[key]) for key in a if key in b and a[key] != b[key]}
    return {
        key: values
        for key, values in found.items()
        if _is_asked(key.rpartition(".")[2], heads) or (not heads and _same_layers(key, *values))
    }


def _same_layers(key: str, one: object, other: object) -> bool:
    """Whether lists say what each layer is, of models with as many layers."""
    listed = key.rpartition(".")[2] in LAYER_LISTS and isinstance(one, list) and isinstance(other, list)
    return listed and len(one) == len(other)  # type: ignore[arg-type]


def is_material(key: str) -> bool:
    """Whether a setting changes what the weights compute.

    Example:
        >>> is_material("rope_parameters.rope_theta"), is_material("text_config.use_cache")
        (True, False)
    """
    return _is_asked(key.rpartition(".")[2], False)


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


def text_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the model's text: all of it, for most.

    Example:
        >>> text_of({"vision_config": {"n_layer": 3}, "text_config": {"n_layer": 2}}), text_of({"n_layer": 1})
        ({'n_layer': 2}, {'n_layer': 1})
    """
    return next((config[key] for key in _TEXT if isinstance(config.get(key), Mapping)), config)


def depth_keys(config: Mapping[str, Any], stack: str) -> list[str]:
    """Return the settings that count the layers of a stack.

    A decoder that is published alone keeps the configuration of the whole model, whose ``num_hidden_layers`` is that of
    the encoder.

    Args:
        config: What describes the text.
        stack: Name of the stack of layers.

    Example:
        >>> bart = {"encoder_layers": 12, "decoder_layers": 6, "num_hidden_layers": 12}
        >>> depth_keys(bart, "model.decoder.layers"), depth_keys(bart, "model.encoder.layers")
        (['decoder_layers'], ['encoder_layers', 'num_hidden_layers'])
        >>> depth_keys({"num_hidden_layers": 12}, "model.decoder.layers")
        ['num_hidden_layers']
    """
    sides = [part for part in stack.split(".") if part in ("encoder", "decoder")]
    own = [key for side in sides[:1] for key in (f"{side}_layers", f"num_{side}_layers") if key in config]
    usual = [key for key in DEPTH_KEYS if key in config]
    if not own:
        return usual
    return own + [key for key in usual if sides[0] == "encoder" and config[key] == config[own[0]]]


def drafts(config: Mapping[str, Any], length: int) -> int:
    """Return how many of a stack's layers come after those of the model: they draft further tokens.

    Example:
        >>> drafts({"num_hidden_layers": 61, "num_nextn_predict_layers": 1}, 62)
        1
    """
    text = text_of(config)
    more = text.get("num_nextn_predict_layers") or 0
    return more if any(text.get(key) == length - more for key in DEPTH_KEYS) else 0


def rewritten(config: Mapping[str, Any], *, dtype: str | None = None, **settings: Any) -> dict[str, Any]:
    """Return a configuration with other settings of its text, wherever it has them, and one dtype in all its parts.

    Another ``vocab_size`` is that of all tables that had as many rows.

    Example:
        >>> rewritten({"text_config": {"vocab_size": 2, "dtype": "float32"}, "dtype": "float32"}, vocab_size=3)
        {'text_config': {'vocab_size': 3, 'dtype': 'float32'}, 'dtype': 'float32'}
    """
    out: dict[str, Any] = copy.deepcopy(dict(config))
    text: Any = text_of(out)
    if "vocab_size" in settings and (size := text.get("vocab_size", out.get("vocab_size"))) is not None:
        alike = [key for key in VOCABULARY_SIZES if text.get(key) == size]
        settings = dict.fromkeys(alike, settings["vocab_size"]) | settings
    for key, value in settings.items():
        if key in out or text is out:
            out[key] = value
        if text is not out and (key in text or key not in out):
            text[key] = value
    if dtype is not None:
        for part in _parts(out):
            for key in ("torch_dtype", "dtype"):
                if key in part:
                    part[key] = dtype
        if not {"torch_dtype", "dtype"} & out.keys():
            out["dtype"] = dtype
    return out


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield config
    for key, value in config.items():
        if key != "quantization_config" and isinstance(value, dict):
            yield from _parts(value)
