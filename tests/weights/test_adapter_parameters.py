"""Adapters of experts, and of models that files and classes call otherwise: what PEFT merges, to the rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import CheckpointError, UnsupportedError
from modicum.jobs.loading.serving import export_adapter
from modicum.weights import Checkpoint, average, merge_loras, merge_state_dicts
from weights.test_moved_layers import DEEPSEEK, SIZES

TEXT = SIZES | {"num_hidden_layers": 2, "intermediate_size": 24}
TOWER = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 8,
         "patch_size": 4}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": TEXT, "mixtral": TEXT, "olmoe": TEXT, "deepseek_v3": TEXT | DEEPSEEK,
    "gpt_oss": TEXT | {"intermediate_size": 16},  # as published: experts as high as wide
    "llama4_text": TEXT | {"intermediate_size_mlp": 16},
    "gemma3": {"text_config": TEXT, "vision_config": TOWER | {"vision_use_head": False}, "mm_tokens_per_image": 4},
    "llava": {"text_config": TEXT | {"model_type": "llama"},
              "vision_config": TOWER | {"model_type": "clip_vision_model", "projection_dim": 8}},
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "vocab_size": 16, "n_positions": 16},
}  # fmt: skip
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
ALL = {"target_modules": "all-linear"}
CASES = [
    ("qwen3_moe", ALL), ("qwen3_moe", EXPERTS | {"target_parameters": ["down_proj"]}), ("mixtral", ALL),
    ("olmoe", EXPERTS | {"use_rslora": True, "alpha_pattern": {"gate_up_proj": 3}, "rank_pattern": {"down_proj": 3}}),
    ("deepseek_v3", ALL), ("gpt_oss", EXPERTS), ("gpt_oss", EXPERTS | {"target_parameters": ["experts.down_proj"]}),
    ("llama4_text", EXPERTS),
    ("gemma3", ALL), ("llava", ALL | {"modules_to_save": ["lm_head"]}),
]  # fmt: skip


def build(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(kind, **SETTINGS[kind])
    auto = "ImageTextToText" if "vision_config" in SETTINGS[kind] else "CausalLM"
    torch.manual_seed(0)
    return getattr(transformers, f"AutoModelFor{auto}").from_config(config)


def adapter(base: Path, out: Path, model: Any, options: dict[str, Any], seed: int = 1) -> None:
    config = peft.LoraConfig(**({"r": 2, "lora_alpha": 3} | options))
    wrapped = peft.get_peft_model(type(model).from_pretrained(base), config)
    numbers = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=numbers))
    wrapped.save_pretrained(out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_an_adapter_of_parameters_is_what_peft_merges(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = build(kind)
    model.save_pretrained(tmp_path / "m")
    adapter(tmp_path / "m", tmp_path / "a", model, options)
    merged = peft.PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "m"), tmp_path / "a")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    ours, expected = Checkpoint(tmp_path / "a", base=tmp_path / "m"), Checkpoint(tmp_path / "merged")
    assert set(ours) == set(expected)
    changed = 0
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)
        changed += not torch.equal(ours.base[name], tensor)
    assert changed >= len(ours.adapter.factors) > 0  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore")
def test_names_of_published_files_are_found(tmp_path: Path) -> None:
    model = build("gpt2")
    model.save_pretrained(tmp_path / "m")
    adapter(tmp_path / "m", tmp_path / "a", model, {"target_modules": ["c_attn", "wte"]})
    expected = dict(Checkpoint(tmp_path / "a", base=tmp_path / "m"))
    file = tmp_path / "m/model.safetensors"
    save_file({name.removeprefix("transformer."): t for name, t in load_file(file).items()}, file, {"format": "pt"})
    for name, tensor in Checkpoint(tmp_path / "a", base=tmp_path / "m").items():
        assert torch.equal(tensor, expected[f"transformer.{name}"])


@pytest.mark.filterwarnings("ignore")
def test_where_factors_of_modules_are_expected_those_of_parameters_are_refused_or_made_whole(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "m")
    for seed in (1, 2):
        adapter(tmp_path / "m", tmp_path / f"a{seed}", model, EXPERTS, seed)
    folders = [tmp_path / "a1", tmp_path / "a2"]
    with pytest.raises(CheckpointError, match="a parameter that is no module of its own. Use merge"):
        merge_loras(folders, tmp_path / "out", method="tsv")
    with pytest.raises(UnsupportedError, match="servers refuse"):
        export_adapter(folders[0], tmp_path / "served")
    average(folders, tmp_path / "mean", method="uniform")
    opened = [dict(Checkpoint(folder)) for folder in folders]
    expected = merge_state_dicts(None, opened, method="linear")
    for name, tensor in Checkpoint(tmp_path / "mean").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_factors_that_fit_no_parameter_are_refused(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path / "m")
    adapter(tmp_path / "m", tmp_path / "a", model, EXPERTS)
    file = tmp_path / "a/adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "base_layer.lora_A" in name)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, file)
    with pytest.raises(CheckpointError, match="which do not fit. Use the base that it was trained on"):
        Checkpoint(tmp_path / "a", base=tmp_path / "m")
    save_file({n: t for n, t in tensors.items() if "experts.lora" not in n}, file)
    with pytest.raises(UnsupportedError, match="1 parameters of .* and its base has"):
        Checkpoint(tmp_path / "a", base=tmp_path / "m")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_average_of_adapters_that_shifted_their_base_is_that_of_the_models(start: str, tmp_path: Path) -> None:
    model = build("gpt_oss")
    model.save_pretrained(tmp_path / "m")
    for seed in (1, 2):
        adapter(tmp_path / "m", tmp_path / f"a{seed}", model,
                {"target_modules": ["q_proj"], "init_lora_weights": start}, seed)  # fmt: skip
    folders = [tmp_path / "a1", tmp_path / "a2"]
    average(folders, tmp_path / "mean", method="uniform", dtype="float32")
    expected = merge_state_dicts(None, [dict(Checkpoint(folder)) for folder in folders], method="linear")
    for name, tensor in Checkpoint(tmp_path / "mean").items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-5, atol=1e-6)
