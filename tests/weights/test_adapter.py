from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import CheckpointError, UnsupportedError
from modicum.weights import Checkpoint
from modicum.weights.adapter import PROMPTS
from support import tiny_llama


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_llama(seed=0).save_pretrained(folder)
    return folder


def train_adapter(base: Path, out: Path, **options: object) -> dict[str, torch.Tensor]:
    """Write an adapter with random factors, and return the weights that PEFT merges it into."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | options))
    wrapped = peft.get_peft_model(model, config)
    rng = torch.Generator().manual_seed(5)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=rng)
    wrapped.save_pretrained(out)
    return {name: tensor.clone() for name, tensor in wrapped.merge_and_unload().state_dict().items()}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 32}},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["embed_tokens", "k_proj"]},
    ],
    ids=lambda options: next(iter(options), "plain"),
)
def test_an_adapter_reads_as_peft_merges_it(base: Path, tmp_path: Path, options: dict[str, object]) -> None:
    expected = train_adapter(base, tmp_path / "a", **options)
    folded = Checkpoint(tmp_path / "a")
    assert set(folded) <= set(expected)
    for name in folded:
        torch.testing.assert_close(folded[name].float(), expected[name], rtol=1e-6, atol=1e-6)
    changed = [name for name in folded if not torch.equal(folded[name], Checkpoint(base)[name])]
    assert changed


def test_the_base_can_be_named_anew(base: Path, tmp_path: Path) -> None:
    train_adapter(base, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "/gone/away/far"}))
    with pytest.raises(CheckpointError, match="There is no model folder /gone/away/far"):
        Checkpoint(tmp_path / "a")
    assert len(Checkpoint(tmp_path / "a", base=base)) == len(Checkpoint(base))


@pytest.mark.parametrize("change", [{"use_dora": True}, {"peft_type": "IA3"}])
def test_what_is_more_than_a_low_rank_delta_is_refused(base: Path, tmp_path: Path, change: dict[str, object]) -> None:
    train_adapter(base, tmp_path / "a")
    config = tmp_path / "a" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UnsupportedError, match="Merge it into its base with PEFT first"):
        Checkpoint(tmp_path / "a")


def test_prompts_are_no_change_of_weights(base: Path, tmp_path: Path) -> None:
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    assert {
        kind.value for kind, made in PEFT_TYPE_TO_TUNER_MAPPING.items() if not issubclass(made, BaseTuner)
    } == PROMPTS
    settings = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedError, match=r"type PREFIX_TUNING, expected LORA. It changes no weights"):
        Checkpoint(tmp_path)


def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    train_adapter(base, tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = next(n for n in tensors if n.endswith("q_proj.lora_B.weight"))
    save_file({**tensors, name: torch.ones(99, 4)}, weights)
    with pytest.raises(CheckpointError, match=r"changes '.*q_proj.weight' of shape \[99"):
        Checkpoint(tmp_path / "a")
    save_file({n: t for n, t in tensors.items() if n != name}, weights)
    with pytest.raises(CheckpointError, match="has no lora_B"):
        Checkpoint(tmp_path / "a")
    save_file({**tensors, "base_model.model.ghost.weight": torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match="'ghost.weight', which its base .* does not have"):
        Checkpoint(tmp_path / "a")
