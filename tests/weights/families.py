"""Families of small models as people publish them: several architectures, tied and untied, sharded, of several parts.

Each family is a base and experts ``a``, ``b`` and ``c``, some with tokenizers of their own. They are random and alike:
an expert is its base and a small difference.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

NAMES = ("base", "a", "b", "c")
SIZES = {
    "vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_local_experts": 4}
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8,
         "patch_size": 4, "vision_use_head": False}  # fmt: skip


def _gemma3_of_two(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    text = settings | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=3
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _gpt2(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=24, n_positions=32, n_embd=16, n_layer=4, n_head=4, n_inner=24)
    )


def _t5(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=24, d_model=16, d_kv=4, d_ff=24, num_layers=3, num_heads=4, feed_forward_proj="gated-gelu"
        )
    )


def _mamba(name: str, settings: dict[str, Any]) -> Any:
    import transformers

    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=24, hidden_size=16, state_size=4, num_hidden_layers=4, time_step_rank=2)
    )


def _causal(kind: str, **more: Any) -> Callable[[str, dict[str, Any]], Any]:
    def make(name: str, settings: dict[str, Any]) -> Any:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**settings | more)
        return getattr(transformers, f"{kind}ForCausalLM")(config)

    return make


FAMILIES: dict[str, Callable[[str, dict[str, Any]], Any]] = {
    "llama": _causal("Llama", tie_word_embeddings=False),
    "tied": _causal("Llama", tie_word_embeddings=True),
    "mistral": _causal("Mistral", tie_word_embeddings=False, sliding_window=16),
    "qwen2": _causal("Qwen2", tie_word_embeddings=True),
    "qwen3": _causal("Qwen3", tie_word_embeddings=True),
    "gemma2": _causal("Gemma2", query_pre_attn_scalar=4),
    "phi3": _causal("Phi3", tie_word_embeddings=False),
    "neox": _causal("GPTNeoX", tie_word_embeddings=False),
    "mixtral": _causal("Mixtral", tie_word_embeddings=False, **EXPERTS),
    "qwen3moe": _causal("Qwen3Moe", tie_word_embeddings=False, **EXPERTS),
    "gpt2": _gpt2,
    "gemma3vl": _gemma3_of_two,
    "t5": _t5,
    "mamba": _mamba,
}
# Tokens of each model: the first ones stand in the vocabulary, those in angle brackets are added to it.
WORDS = {
    "base": ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop"],
    "a": ["<pad>", "<s>", "</s>", "<unk>", *"abcdefghijklmnop", "<im_start>", "<im_end>"],
    "b": ["<pad>", "<s>", "</s>", "<unk>", *"bacdefghijklmnopq", "<tool>"],
    "c": ["<pad>", "<s>", "</s>", "<unk>", *"ponmlkjihgfedcba"],
}


def _as_published(family: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by the names of published files, where transformers writes others or leaves some out."""
    if family == "gemma3vl":
        return {name.replace("vision_tower.", "vision_tower.vision_model."): each for name, each in tensors.items()}
    if family == "neox":
        mask = torch.ones(32, 32, dtype=torch.bool).tril()[None, None]
        for layer in range(4):
            at = f"gpt_neox.layers.{layer}.attention"
            tensors |= {f"{at}.bias": mask.clone(), f"{at}.masked_bias": torch.tensor(-1e9),
                        f"{at}.rotary_emb.inv_freq": torch.ones(1)}  # fmt: skip
    return tensors


def make_family(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shards: bool = False, **sizes: int
) -> None:
    """Write the models of a family."""
    base = FAMILIES[family]("base", SIZES | sizes).to(dtype)
    for seed, name in enumerate(NAMES):
        # Numbers of our own, not those of transformers' initialisation, which may change with its versions.
        start, change = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
        for _, tensor in sorted(base.state_dict().items()):
            if tensor.is_floating_point():
                made = 0.2 * torch.randn(tensor.shape, generator=start)
                tensor.copy_(made + 0.02 * bool(seed) * torch.randn(tensor.shape, generator=change))
        base.tie_weights()
        size = "20KB" if shards and name in ("base", "b") else "1GB"
        base.save_pretrained(folder / name, max_shard_size=size)
        if not shards:
            file = folder / name / "model.safetensors"
            save_file(_as_published(family, load_file(file)), file, {"format": "pt"})


def make_vocabularies(folder: Path, *, tied: bool = False) -> None:
    """Write Llamas with a tokenizer each, which share most of their tokens, in other rows."""
    for seed, (name, words) in enumerate(WORDS.items()):
        model = _causal("Llama", tie_word_embeddings=tied)(name, SIZES | {"vocab_size": len(words)})
        numbers = torch.Generator().manual_seed(100 + seed)
        for _, tensor in sorted(model.state_dict().items()):
            tensor.copy_(0.2 * torch.randn(tensor.shape, generator=numbers))
        model.tie_weights()
        model.save_pretrained(folder / name)
        write_tokenizer(folder / name, words)


def write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    """Write a tokenizer of whole words with these tokens, those in angle brackets as added tokens."""
    vocabulary = {word: row for row, word in enumerate(words) if len(word) == 1 or row < 4}
    added = [
        {"id": row, "content": word, "single_word": False, "lstrip": row % 2 == 0, "rstrip": False, "normalized": False,
         "special": row < 4}
        for row, word in enumerate(words) if word.startswith("<")
    ]  # fmt: skip
    data = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(data))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 32} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def make_all(folder: Path) -> Path:
    """Write every family, and return the folder of all."""
    for family in FAMILIES:
        make_family(folder / family, family)
    make_family(folder / "sharded", "llama", shards=True)
    make_family(folder / "half", "mistral", dtype=torch.bfloat16)
    make_vocabularies(folder / "words")
    make_vocabularies(folder / "tiedwords", tied=True)
    return folder
