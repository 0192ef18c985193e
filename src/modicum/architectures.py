"""What the classes of some architectures do that no tensor and no ``config.json`` says."""

from __future__ import annotations

from collections.abc import Sequence

# Whose output layer is the embedding where config.json does not say: the default of transformers' class. Not of falcon,
# whose published files hold their output layer, nor of models of several parts, whose text has a class of its own.
_TIED = frozenset(
    {
        "albert", "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "biogpt", "blenderbot",
        "blenderbot-small", "bloom", "camembert", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text", "convbert",
        "cpmant", "ctrl", "data2vec-text", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "ernie4_5",
        "ernie4_5_moe", "esm", "falcon_mamba", "flaubert", "fnet", "funnel", "gemma", "gemma2", "gemma3", "gemma3_text",
        "gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified_text", "gpt-sw3", "gpt2", "gpt_bigcode",
        "gpt_neo", "gpt_neox_japanese", "granite_swa", "gte", "ibert", "jetmoe", "jina_embeddings_v3", "lara_mini",
        "layoutlm", "led", "lfm2", "lfm2_moe", "lfm3", "longformer", "longt5", "luke", "lxmert", "m2m_100", "mamba",
        "marian", "mbart", "megatron-bert", "minicpm3", "mobilebert", "modernbert", "modernbert-decoder", "moonshine",
        "mpnet", "mpt", "mra", "mt5", "mvp", "neomme", "nllb-moe", "nomic_bert", "nystromformer", "openai-gpt", "opt",
        "paligemma", "pegasus", "pegasus_x", "plbart", "pop2piano", "prophetnet", "recurrent_gemma", "roberta",
        "roberta-prelayernorm", "roc_bert", "roformer", "seamless_m4t", "seamless_m4t_v2", "shieldgemma2", "smollm3",
        "speech_to_text", "speecht5", "squeezebert", "starcoder2", "switch_transformers", "t5", "t5gemma", "t5gemma2",
        "tapas", "trocr", "udop", "umt5", "vaultgemma", "visual_bert", "whisper", "xglm", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xlnet", "xmod", "yoso", "youtu", "zamba", "zamba2", "zaya",
    }
)  # fmt: skip
# Whose class counts the visits of its layers.
_SHARED_LAYERS = frozenset({"albert", "hrm_text", "zero_token"})
# Whose class stores the matrices of experts as (inputs, outputs).
_TURNED_EXPERTS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})
# Published with experts `block_sparse_moe.experts.0.w1`, which transformers fuses into `mlp.experts.gate_up_proj`.
_NUMBERED_EXPERTS = frozenset({"mixtral", "minimax", "minimax_m2"})
# transformers' models with layers that store their weight as (inputs, outputs), by the names of these layers.
_TURNED_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_TURNED = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})


def is_tied_unsaid(model_type: str) -> bool:
    """Whether the class ties the output layer to the embedding where ``config.json`` does not say.

    Example:
        >>> is_tied_unsaid("gemma2"), is_tied_unsaid("llama")
        (True, False)
    """
    return model_type in _TIED


def shares_layers(model_type: str) -> bool:
    """Whether the class of a model goes through a layer several times, so that it stores fewer than it counts.

    Example:
        >>> shares_layers("albert"), shares_layers("bert")
        (True, False)
    """
    return model_type in _SHARED_LAYERS


def are_experts_turned(model_type: str) -> bool:
    """Whether the class of a model stores the matrices of its experts as (inputs, outputs).

    Example:
        >>> are_experts_turned("gpt_oss"), are_experts_turned("qwen3_moe")
        (True, False)
    """
    return model_type in _TURNED_EXPERTS


def is_turned(name: str, model_type: str) -> bool:
    """Whether a matrix is stored as (inputs, outputs), as in GPT-2, where all others have (outputs, inputs).

    Example:
        >>> is_turned("h.0.attn.c_proj.weight", "gpt2"), is_turned("h.0.attn.c_proj.weight", "gpt_bigcode")
        (True, False)
    """
    return model_type in _TURNED_MODELS and name.split(".")[-2] in _TURNED


def unfused(name: str, shape: Sequence[int], model_type: str) -> dict[str, tuple[int | tuple[int, int], ...]]:
    """Return the names that a tensor has where each expert is stored by itself, and which part of it each is.

    Example:
        >>> unfused("model.layers.0.mlp.experts.down_proj", (2, 4, 3), "qwen3_moe")
        {'model.layers.0.mlp.experts.0.down_proj.weight': (0,), 'model.layers.0.mlp.experts.1.down_proj.weight': (1,)}
        >>> unfused("model.layers.0.mlp.gate.weight", (2, 4), "mixtral")
        {'model.layers.0.block_sparse_moe.gate.weight': ()}
    """
    old = model_type in _NUMBERED_EXPERTS
    module, _, kind = name.rpartition(".")
    own = module.replace(".mlp.", ".block_sparse_moe.") if old else module
    if not (module.endswith(".experts") and len(shape) == 3 and kind in ("gate_up_proj", "down_proj")):
        return {f"{own}.{kind}" if old and module.endswith(".mlp.gate") else name: ()}
    gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
    found: dict[str, tuple[int | tuple[int, int], ...]] = {}
    for expert in range(shape[0]):
        at = f"{own}.{expert}"
        if kind == "down_proj":
            found[f"{at}.{down}.weight"] = (expert,)
        else:
            half = shape[1] // 2
            found |= {f"{at}.{gate}.weight": (expert, (0, half)), f"{at}.{up}.weight": (expert, (half, shape[1]))}
    return found
