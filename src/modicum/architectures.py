"""What the classes of some architectures do that no tensor and no ``config.json`` says."""

from __future__ import annotations

# Whose output layer is the embedding where config.json does not say.
_TIED = frozenset(
    {
        "bloom",
        "cohere",
        "cohere2",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gpt2",
        "gpt_bigcode",
        "mpt",
        "opt",
        "starcoder2",
    }
)
# Whose class stores the matrices of experts as (inputs, outputs).
_TURNED_EXPERTS = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


def is_tied_unsaid(model_type: str) -> bool:
    """Whether the class ties the output layer to the embedding where ``config.json`` does not say.

    Example:
        >>> is_tied_unsaid("gemma2"), is_tied_unsaid("llama")
        (True, False)
    """
    return model_type in _TIED


def are_experts_turned(model_type: str) -> bool:
    """Whether the class of a model stores the matrices of its experts as (inputs, outputs).

    Example:
        >>> are_experts_turned("gpt_oss"), are_experts_turned("qwen3_moe")
        (True, False)
    """
    return model_type in _TURNED_EXPERTS
