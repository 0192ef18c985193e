"""Models of several stacks of layers and nested configurations: every key that is written goes by its own stack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.weights import Checkpoint
from modicum.weights.configs import drafts, rewritten

TEXT = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 16}


def vision_language() -> Any:
    text = TEXT | {"num_hidden_layers": 2, "head_dim": 4, "layer_types": ["sliding_attention", "full_attention"]}
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3,
             "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=tower, mm_tokens_per_image=4, image_token_index=9
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def encoder_decoder() -> Any:
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    return transformers.T5ForConditionalGeneration(config)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [vision_language, encoder_decoder], ids=lambda make: make.__name__)
@pytest.mark.parametrize("mergekit", [False, True])
def test_a_model_of_several_stacks_merges_and_opens(make: Any, mergekit: bool, tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in "ab"]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        make().save_pretrained(name)
    ours: dict[str, Any] = {"job": "merge", "experts": names, "method": {"name": "linear"}, "dtype": "bfloat16"}
    theirs: dict[str, Any] = {
        "merge_method": "linear", "dtype": "bfloat16",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in names],
    }  # fmt: skip
    execute(parse(theirs if mergekit else ours), tmp_path / "run", quiet=True)
    folder = tmp_path / "run" / "model"
    made, report = type(make()).from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    before, after = (json.loads((Path(f) / "config.json").read_text()) for f in (names[0], folder))
    assert after == rewritten(before, dtype="bfloat16")
    dtypes = {key: value for key, value in flat(after).items() if key.endswith("dtype")}
    assert set(dtypes.values()) == {"bfloat16"}
    assert made.dtype == torch.bfloat16


def flat(value: Any, at: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {at: value}
    return {key: item for name, inner in value.items() for key, item in flat(inner, f"{at}.{name}").items()}


def sliced(folder: Path, *spans: tuple[int, int]) -> dict[str, Any]:
    slices = [{"sources": [{"model": str(folder), "layer_range": list(span)}]} for span in spans]
    return {"merge_method": "passthrough", "slices": slices, "dtype": "float32"}


def text_alone(folder: Path) -> Path:
    """Write a model whose only layers are its text's, with the settings of a vision tower beside the text's."""
    vision_language().save_pretrained(folder)
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if "vision" not in n}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_slices_rewrite_the_settings_of_the_text_alone(tmp_path: Path) -> None:
    execute(parse(sliced(text_alone(tmp_path / "m"), (0, 2), (0, 1))), tmp_path / "run", quiet=True)
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == 3
    assert config["text_config"]["layer_types"] == ["sliding_attention", "full_attention", "sliding_attention"]
    assert config["vision_config"]["num_hidden_layers"] == 3
    assert "num_hidden_layers" not in config
    assert "layer_types" not in config


def test_a_union_of_vocabularies_is_counted_in_the_text() -> None:
    config = {"vision_config": {"vocab_size": 5}, "text_config": {"vocab_size": 16}}
    assert rewritten(config, vocab_size=18) == config | {"text_config": {"vocab_size": 18}}
    assert rewritten(config | {"vocab_size": 16}, vocab_size=18)["vocab_size"] == 18
    assert config["text_config"] == {"vocab_size": 16}
    assert rewritten({"torch_dtype": "float32", "a": {"dtype": "float32"}, "quantization_config": {"dtype": "x"}},
                     dtype="float16") == {
        "torch_dtype": "float16", "a": {"dtype": "float16"}, "quantization_config": {"dtype": "x"},
    }  # fmt: skip


def drafting(folder: Path) -> Path:
    config = transformers.LlamaConfig(**TEXT, num_hidden_layers=3)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if "layers.2." in n}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 1}))
    return folder


def test_layers_that_draft_are_not_part_of_the_depth(tmp_path: Path) -> None:
    folder = drafting(tmp_path / "m")
    assert drafts(Checkpoint(folder).config, 4) == 1
    assert drafts(Checkpoint(folder).config, 3) == 0
    with pytest.raises(ModicumError, match="has 4 layers, of which its config.json counts 3"):
        plan(parse(sliced(folder, (0, 2))))
    document: dict[str, Any] = {"merge_method": "passthrough", "dtype": "float32", "models": [{"model": str(folder)}]}
    execute(parse(document | {"parameters": {"scale": [1, 2]}}), tmp_path / "run", quiet=True)
    before, after = Checkpoint(folder), Checkpoint(tmp_path / "run/model")
    for number, scale in enumerate([1, 1.5, 2, 2]):
        name = f"model.layers.{number}.mlp.up_proj.weight"
        torch.testing.assert_close(after[name], scale * before[name])


@pytest.mark.filterwarnings("ignore")
def test_gpt_neo_s_two_lists_agree(tmp_path: Path) -> None:
    config = transformers.GPTNeoConfig(
        vocab_size=16, hidden_size=8, num_heads=2, num_layers=4, attention_types=[[["global", "local"], 2]],
        max_position_embeddings=16,
    )  # fmt: skip
    transformers.GPTNeoForCausalLM(config).save_pretrained(tmp_path / "m")
    execute(parse(sliced(tmp_path / "m", (0, 3), (1, 4))), tmp_path / "run", quiet=True)
    made = transformers.AutoConfig.from_pretrained(tmp_path / "run/model")
    assert made.attention_layers == ["global", "local", "global", "local", "global", "local"]


def test_lists_that_nobody_names_go_with_their_layers(tmp_path: Path) -> None:
    config = transformers.GraniteSWAConfig(**TEXT, num_hidden_layers=4, layer_rope_theta=[1e4, 2e4, 3e4, 4e4])
    transformers.GraniteSWAForCausalLM(config).save_pretrained(tmp_path / "m")
    execute(parse(sliced(tmp_path / "m", (2, 4), (0, 2))), tmp_path / "run", quiet=True)
    made = transformers.AutoConfig.from_pretrained(tmp_path / "run/model")
    assert made.layer_rope_theta == [3e4, 4e4, 1e4, 2e4]
    assert made.layer_types == [config.layer_types[number] for number in (2, 3, 0, 1)]


def test_a_config_that_transformers_would_not_open_is_refused_by_the_plan(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**TEXT, head_dim=4, num_hidden_layers=2)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "m")
    file = tmp_path / "m/config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"layer_types": ["full_attention"] * 2, "layer_typos": 1})
    )
    assert plan(parse(sliced(tmp_path / "m", (0, 2), (0, 1))))
    from modicum.weights.mergekit import planning

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ModicumError, match="transformers would not open"):
        patch.setattr(planning, "LAYER_LISTS", frozenset())
        patch.setattr("modicum.jobs.merging.layers.settled", lambda plan: plan)
        plan(parse(sliced(tmp_path / "m", (0, 2), (0, 1))))
