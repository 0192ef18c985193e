from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modicum.errors import CheckpointError, RecipeError
from modicum.registry import merge_method
from modicum.weights import Checkpoint, extract_lora, merge, merge_loras
from modicum.weights.adapter import LowRank
from modicum.weights.lora import merge_factors
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
    with pytest.raises(RecipeError, match="max_rank is 0"):
        extract_lora(models[1], models[0], tmp_path / "lora", max_rank=0)


IN_FACTORS = {
    "tsv": {},
    "svc": {"alpha": 0.5},
    "opcm": {},
    "task_arithmetic": {"scale": 0.4, "weights": [1.0, 0.5, 2.0]},
    "knots": {"density": 0.5, "scale": 0.7},
}


def random_factors(out: int, width: int, ranks: list[int]) -> list[LowRank]:
    rng = torch.Generator().manual_seed(0)
    return [LowRank(torch.randn(r, width, generator=rng), torch.randn(out, r, generator=rng), 0.5) for r in ranks]


def test_the_methods_for_factors_are_tested() -> None:
    assert set(IN_FACTORS) == {name for name, entry in merge_method.items() if entry.facts.factors}


@pytest.mark.parametrize("method", IN_FACTORS)
@pytest.mark.parametrize(("shape", "ranks"), [((16, 20), [3, 3, 3]), ((16, 20), [2, 4, 1]), ((6, 30), [3, 3, 3]),
                                              ((4, 2), [2, 2, 2])])  # fmt: skip
def test_merging_in_factor_space_equals_merging_matrices(method: str, shape: tuple[int, int], ranks: list[int]) -> None:
    experts = random_factors(*shape, ranks)
    A, B, measured = merge_factors(experts, method=method, **IN_FACTORS[method])
    function = merge_method[method].function
    expected = function(torch.zeros(shape), [e.delta() for e in experts], **IN_FACTORS[method])
    torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)
    assert A.shape[0] <= sum(ranks)
    assert measured["norms"] == pytest.approx([float(e.delta().norm()) for e in experts], rel=1e-5)


def test_an_expert_that_does_not_change_a_weight_counts_as_zero() -> None:
    experts = random_factors(16, 20, [3, 3])
    A, B, measured = merge_factors([experts[0], None, experts[1]])
    expected = tsv(torch.zeros(16, 20), [experts[0].delta(), torch.zeros(16, 20), experts[1].delta()])
    torch.testing.assert_close(B @ A, expected, rtol=1e-4, atol=1e-4)
    assert measured["norms"][1] == 0
    empty = LowRank(torch.zeros(2, 20), torch.zeros(16, 2), 1.0)
    A, B, _ = merge_factors([empty, empty])
    assert not (B @ A).any()


def test_merged_adapters_are_an_adapter(models: tuple[Path, Path], tmp_path: Path) -> None:
    base, _ = models
    train_adapter(base, tmp_path / "a", r=2)
    train_adapter(base, tmp_path / "b", r=3, target_modules=["q_proj", "v_proj"])
    measured = merge_loras([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert {name.split(".")[-2] for name in measured} == {"q_proj", "v_proj", "down_proj"}
    assert max(row["rank"] for row in measured.values()) == 5
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload().state_dict()
    merge(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "full", method="tsv", dtype="float32")
    full = Checkpoint(tmp_path / "full")
    for name in full:
        torch.testing.assert_close(loaded[name].float(), full[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(CheckpointError, match="is a full model, expected a LoRA adapter"):
        merge_loras([base], tmp_path / "out2")
    with pytest.raises(RecipeError, match="ties needs whole matrices.*Choose one of knots, opcm, svc, task_arithmetic"):
        merge_loras([tmp_path / "a"], tmp_path / "out2", method="ties", density=0.5)
    with pytest.raises(RecipeError, match="unknown key"):
        merge_loras([tmp_path / "a"], tmp_path / "out2", density=0.5)
    assert not (tmp_path / "out2").exists()


def test_factors_that_are_not_finite_are_neither_merged_nor_extracted(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    base, tuned = models
    for name, r in (("a", 2), ("b", 3)):
        train_adapter(base, tmp_path / name, r=r)
    weights = tmp_path / "b" / "adapter_model.safetensors"
    tensors = load_file(weights)
    key = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    tensors[key][0, 0] = 1e20
    save_file(tensors, weights)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="q_proj.lora_.*: tsv gives .* in float16"):
        merge_loras([tmp_path / "a", tmp_path / "b"], tmp_path / "out", dtype="float16")
    tensors[key][0, 0] = math.nan
    save_file(tensors, weights)
    for call in (merge_loras, partial(merge, base, method="tsv")):
        with pytest.raises(CheckpointError, match=r"b: tensor '.*q_proj.weight' has \d+ values that are NaN"):
            call([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"b: tensor '.*q_proj.weight' has \d+ values that are NaN"):
        extract_lora(tmp_path / "b", base, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before
    loud = dict(Checkpoint(tuned)) | {"model.layers.0.mlp.up_proj.weight": torch.full((64, 32), 1e12)}
    save_file({k: t.clone() for k, t in loud.items()}, tmp_path / "b" / "loud.safetensors")
    with pytest.raises(CheckpointError, match="up_proj.lora_.*: extract_lora gives .* in float16"):
        extract_lora(tmp_path / "b" / "loud.safetensors", base, tmp_path / "out", dtype=torch.float16)
