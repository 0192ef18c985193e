"""Checkpoints with the shapes of real models and made-up numbers: all that speed and memory depend on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

SMOLLM2_135M = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_1_5B = {
    "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 32, "vocab_size": 32000, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def llama_shapes(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a Llama of this configuration."""
    d, f, heads = int(config["hidden_size"]), int(config["intermediate_size"]), int(config["num_attention_heads"])
    kv = d // heads * int(config["num_key_value_heads"])
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (int(config["vocab_size"]), d),
        "model.norm.weight": (d,),
    }
    for layer in range(int(config["num_hidden_layers"])):
        name = f"model.layers.{layer}."
        shapes |= {
            f"{name}self_attn.q_proj.weight": (d, d),
            f"{name}self_attn.k_proj.weight": (kv, d),
            f"{name}self_attn.v_proj.weight": (kv, d),
            f"{name}self_attn.o_proj.weight": (d, d),
            f"{name}mlp.gate_proj.weight": (f, d),
            f"{name}mlp.up_proj.weight": (f, d),
            f"{name}mlp.down_proj.weight": (d, f),
            f"{name}input_layernorm.weight": (d,),
            f"{name}post_attention_layernorm.weight": (d,),
        }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (int(config["vocab_size"]), d)
    return shapes


def write_checkpoint(folder: Path, config: dict[str, object], *, seed: int, base: Path | None = None) -> Path:
    """Write a bf16 Llama with random weights; near ``base`` when it is given. A folder that is there is kept."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    rng = torch.Generator().manual_seed(seed)
    origin = safe_open(base / "model.safetensors", "pt") if base else None

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=rng)
        if origin is None:
            return (0.02 * noise).bfloat16()
        return (origin.get_tensor(name).float() + 0.002 * noise).bfloat16()

    save_file(
        {name: draw(name, shape) for name, shape in llama_shapes(config).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    write_config(folder, config)
    return folder


def write_config(folder: Path, config: dict[str, object]) -> None:
    """Write the ``config.json`` of a Llama."""
    about = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu",
             "rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "bos_token_id": 1,
             "eos_token_id": 2, **config}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about, indent=2))


def write_repeated(root: Path, config: dict[str, object], experts: int = 3) -> tuple[Path, list[Path]]:
    """Write a base of zeros and experts that share one file of repeated random numbers: little time, little disk."""
    from modicum.weights.files import Spec, lay_out

    header, _ = lay_out(root, {name: Spec(shape, torch.bfloat16) for name, shape in llama_shapes(config).items()})
    nbytes = 2 * sum(math.prod(shape) for shape in llama_shapes(config).values())
    folders = [root / "base", *(root / f"expert{i + 1}" for i in range(experts))]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        write_config(folder, config)
    files = [folder / "model.safetensors" for folder in folders]
    with files[0].open("wb") as file:
        file.write(header)
        file.truncate(len(header) + nbytes)  # a hole, which reads as zeros
    block = (0.002 * torch.randn(1 << 23, generator=torch.Generator().manual_seed(1))).bfloat16()
    content = memoryview(block.view(torch.uint8).numpy())
    with files[1].open("wb") as file:
        file.write(header)
        for start in range(0, nbytes, len(content)):
            file.write(content[: nbytes - start])
    for link in files[2:]:
        link.hardlink_to(files[1])
    return folders[0], folders[1:]


def write_family(root: Path, config: dict[str, object], experts: int = 3) -> tuple[Path, list[Path]]:
    """Write a base and its experts under ``root``."""
    base = write_checkpoint(root / "base", config, seed=0)
    return base, [write_checkpoint(root / f"expert{i + 1}", config, seed=i + 1, base=base) for i in range(experts)]
