"""Layers in other places: the class makes of each what it was, or the merge is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modicum.errors import ModicumError
from modicum.jobs import execute
from modicum.jobs.merging.layers import _layers, _signature
from modicum.recipe import parse

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 16,
    "head_dim": 8, "num_hidden_layers": 4, "max_position_embeddings": 16, "moe_intermediate_size": 8, "num_experts": 2,
    "n_routed_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
            "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
# Whose class goes by the number of a layer: in lists with an entry for each layer, in lists of numbers, in counts of
# the first ones, and in rules that config.json does not spell out.
WRITTEN: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"mlp_only_layers": [1], "shared_expert_intermediate_size": 8},
    "deepseek_v3": DEEPSEEK,
    "glm4_moe": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "llama4_text": {"intermediate_size_mlp": 16, "interleave_moe_layer_step": 2},
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4,
              "mamba_n_groups": 1},
    "lfm2": {"full_attn_idxs": [1, 3]},
    "gemma2": {"query_pre_attn_scalar": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "smollm3": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_heads": 2, "num_layers": 4},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 4},
}  # fmt: skip
REFUSED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"decoder_sparse_step": 2},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 4, "scale_attn_by_inverse_layer_idx": True},
    "recurrent_gemma": {"lru_width": 16, "block_types": ["recurrent", "attention"]},
    "minimax": {"layer_types": ["full_attention", "linear_attention"] * 2},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_num_experts": 2, "moe_k": 1},
}
SPANS = ([(1, 4)], [(0, 2), (1, 4)], [(0, 1), (2, 3), (0, 4)])


def made(folder: Path, kind: str, **settings: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SIZES | settings)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    return model


def document(folder: Path, spans: list[tuple[int, int]]) -> dict[str, Any]:
    slices = [{"sources": [{"model": str(folder), "layer_range": list(span)}]} for span in spans]
    return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}


def layers(model: Any) -> list[dict[str, object]]:
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return [_signature(layer) for layer in next(m for m in lists if len(m) == model.config.num_hidden_layers)]


def check(before: Any, folder: Path, spans: list[tuple[int, int]]) -> None:
    after, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    old, new = layers(before), layers(after)
    assert new == [old[i] for span in spans for i in range(*span)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", WRITTEN)
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_a_moved_layer_is_what_it_was(kind: str, spans: list[tuple[int, int]], tmp_path: Path) -> None:
    before = made(tmp_path / "m", kind, **WRITTEN[kind])
    try:
        execute(parse(document(tmp_path / "m", spans)), tmp_path / "run", quiet=True)
    except ModicumError as error:  # dense layers after those of experts cannot be said by a count of the first ones
        assert "makes another layer" in str(error) and "first_k_dense_replace" in WRITTEN[kind]
        assert spans is SPANS[2]
        return
    check(before, tmp_path / "run/model", spans)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "smollm3"])
def test_what_a_published_config_leaves_to_the_class_is_written_out(kind: str, tmp_path: Path) -> None:
    before = made(tmp_path / "m", kind, **WRITTEN[kind])
    file = tmp_path / "m/config.json"
    listed = {"layer_types", "no_rope_layers"}
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in listed}))
    for number, spans in enumerate(SPANS):
        execute(parse(document(tmp_path / "m", spans)), tmp_path / f"run{number}", quiet=True)
        check(before, tmp_path / f"run{number}/model", spans)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_layer_that_would_become_another_is_refused(kind: str, tmp_path: Path) -> None:
    made(tmp_path / "m", kind, **REFUSED[kind])
    with pytest.raises(ModicumError, match=r"(?s)^Layer \d of the result is layer \d of [^\n]*$"):
        execute(parse(document(tmp_path / "m", [(0, 2), (1, 4)])), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/model").exists()


def test_a_class_that_cannot_be_built_is_refused(tmp_path: Path) -> None:
    shared = {
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": 16,
        "laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [16] * 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
    }  # fmt: skip
    made(tmp_path / "m", "gemma3n_text", **shared)
    with pytest.raises(ModicumError, match="transformers would not build the result"):
        execute(parse(document(tmp_path / "m", [(1, 4)])), tmp_path / "run", quiet=True)


@pytest.mark.parametrize(("kind", "spans"), [("bart", [(0, 2)]), ("whisper", [(0, 3), (2, 3)])], ids=str)
def test_a_decoder_alone_counts_its_own_layers(kind: str, spans: list[tuple[int, int]], tmp_path: Path) -> None:
    """Its configuration is that of the whole model, whose ``num_hidden_layers`` is the encoder's."""
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=16, d_model=16, encoder_layers=4, decoder_layers=3, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    auto = transformers.AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "m")
    execute(parse(document(tmp_path / "m", spans)), tmp_path / "run", quiet=True)
    model, found = auto.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert len(model.model.decoder.layers) == sum(end - start for start, end in spans)
    assert model.config.encoder_layers == 4


def test_layers_of_a_tower_are_not_the_text_s() -> None:
    text = SIZES | {"num_hidden_layers": 2}
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=tower, mm_tokens_per_image=4)
    found = _layers(config)
    assert found is not None
    assert "Gemma3DecoderLayer" in _signature(found[0]).values()
