from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers

from modicum.errors import CheckpointError, RecipeError
from modicum.weights import Checkpoint, extract_lora, merge, merge_loras
from modicum.weights.adapter import Factors
from modicum.weights.lora import factor_svd, merge_factors
from modicum.weights.methods import tsv
from support import tiny_llama
from weights.test_adapter import train_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    for seed in range(2):
        tiny_llama(seed=seed).save_pretrained(root / f"m{seed}")
    return root / "m0", root / "m1"


def test_an_extracted_adapter_misses_exactly_the_tail(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    report = extract_lora(tuned, base, tmp_path / "lora", max_rank=5)
    folded, before, after = (Checkpoint(f) for f in (tmp_path / "lora", base, tuned))
    for item in report:
        name = f"{item.module}.weight"
        delta = (after[name].float() - before[name].float()).double()
        tail = torch.linalg.svdvals(delta)[5:].square().sum().sqrt()
        missed = (after[name].float() - folded[name].float()).double().norm()
        torch.testing.assert_close(missed, tail, rtol=1e-4, atol=1e-6)
        assert item.energy == pytest.approx(1 - float(tail**2 / delta.square().sum()), abs=1e-6)
    assert len(report) == 14


def test_stock_peft_loads_what_was_extracted(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = models
    extract_lora(tuned, base, tmp_path / "lora", max_rank=8, energy=0.6)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "lora").merge_and_unload().state_dict()
    folded = Checkpoint(tmp_path / "lora")
    for name in folded:
        torch.testing.assert_close(folded[name].float(), merged[name].float(), rtol=1e-4, atol=1e-5)


def test_nothing_to_extract_is_said(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is nothing to extract"):
        extract_lora(models[0], models[0], tmp_path / "lora")
    with pytest.raises(RecipeError, match="max_rank 0"):
        extract_lora(models[1], models[0], tmp_path / "lora", max_rank=0)


def test_factors_decompose_exactly() -> None:
    rng = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(3, 9, generator=rng), torch.randn(7, 3, generator=rng), 1.7)
    part = factor_svd(factors)
    torch.testing.assert_close((part.U * part.S) @ part.V.T, factors.delta(), rtol=1e-5, atol=1e-5)


def test_merging_in_factor_space_equals_merging_matrices() -> None:
    rng = torch.Generator().manual_seed(0)
    experts = [Factors(torch.randn(3, 20, generator=rng), torch.randn(16, 3, generator=rng), 0.5) for _ in range(3)]
    A, B = merge_factors(experts)
    expected = tsv(torch.zeros(16, 20), [e.delta() for e in experts])
    torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)


def test_merged_adapters_are_an_adapter(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = models
    train_adapter(base, tmp_path / "a", r=2)
    train_adapter(base, tmp_path / "b", r=3, target_modules=["q_proj", "v_proj"])
    modules = merge_loras([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert {m.rpartition(".")[2] for m in modules} == {"q_proj", "v_proj", "down_proj"}
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "full", method="tsv", dtype="float32")
    full = Checkpoint(tmp_path / "full")
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(loaded[name].float(), full[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="is a full model, expected a LoRA adapter"):
        merge_loras([base], tmp_path / "out2")
