"""What the classes of some architectures do that no tensor and no ``config.json`` says."""

from __future__ import annotations

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
