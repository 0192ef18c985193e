"""Slices of mergekit files: each source has its own window of layers, whatever model it is of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from support import tiny_llama

UP = "model.layers.{}.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(["base", "a", "b"]):
        tiny_llama(seed=seed, num_hidden_layers=4, hidden_size=8, intermediate_size=8).save_pretrained(folder / name)
    return folder


def run(document: dict[str, Any], out: Path) -> dict[str, torch.Tensor]:
    execute(parse(document | {"dtype": "float32"}), out, quiet=True)
    return load_file(out / "model/model.safetensors")


def source(path: Path, first: int, end: int, **parameters: Any) -> dict[str, Any]:
    return {"model": str(path), "layer_range": [first, end], "parameters": parameters}


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_base_that_is_no_source_takes_part_with_the_same_layers(first: int, root: Path, tmp_path: Path) -> None:
    found = []
    for i, more in enumerate([[], [source(root / "base", first, first + 2)]]):
        sources = [*(source(root / n, first, first + 2, weight=0.5) for n in "ab"), *more]
        document = {
            "merge_method": "task_arithmetic", "base_model": str(root / "base"), "slices": [{"sources": sources}],
        }  # fmt: skip
        found.append(run(document, tmp_path / str(i)))
    base, a, b = (load_file(root / n / "model.safetensors") for n in ("base", "a", "b"))
    assert found[0].keys() == found[1].keys()
    for i in range(2):
        name = UP.format(first + i)
        expected = base[name] + 0.5 * (a[name] - base[name]) + 0.5 * (b[name] - base[name])
        torch.testing.assert_close(found[0][UP.format(i)], expected)
        assert torch.equal(found[0][UP.format(i)], found[1][UP.format(i)])
    assert UP.format(2) not in found[0]


@pytest.mark.parametrize("spans", [((0, 2), (2, 4)), ((1, 3), (0, 2)), ((0, 3), (1, 4))])
def test_one_model_may_stand_twice_in_a_slice(spans: Any, root: Path, tmp_path: Path) -> None:
    sources = [source(root / "a", *span, weight=weight) for span, weight in zip(spans, (0.25, 0.75))]
    document: dict[str, Any] = {"merge_method": "linear", "slices": [{"sources": sources}]}
    merged = run(document, tmp_path / "linear")
    a = load_file(root / "a/model.safetensors")
    for i in range(spans[0][1] - spans[0][0]):
        one, other = (a[UP.format(span[0] + i)] for span in spans)
        torch.testing.assert_close(merged[UP.format(i)], 0.25 * one + 0.75 * other)
    # Its first place is the base's where it is the base.
    document |= {"merge_method": "task_arithmetic", "base_model": str(root / "a")}
    merged = run(document, tmp_path / "base")
    one, other = (a[UP.format(span[0])] for span in spans)
    torch.testing.assert_close(merged[UP.format(0)], one + 0.75 * (other - one))


def test_a_base_without_known_layers_is_refused(root: Path) -> None:
    sources = [source(root / "a", 0, 2, weight=1.0), source(root / "b", 1, 3, weight=1.0)]
    document = {"merge_method": "ties", "base_model": str(root / "base"), "slices": [{"sources": sources}]}
    with pytest.raises(ModicumError, match="base is the base of a slice whose sources have different layer ranges"):
        plan(parse(document))
    assert plan(parse(document | {"merge_method": "linear"}))  # which needs no base


def test_filters_see_the_model_s_name_of_its_parameters_and_the_result_s_of_all_others(
    root: Path, tmp_path: Path
) -> None:
    scale = [{"filter": "layers.2.", "value": 0.0}, {"value": 1.0}]
    slices = [{"sources": [source(root / "a", first, first + 2, scale=scale)]} for first in (0, 1)]
    merged = run({"merge_method": "passthrough", "slices": slices}, tmp_path / "each")
    assert [bool(merged[UP.format(i)].any()) for i in range(4)] == [True, True, True, False]
    both = [{"sources": [source(root / n, first, first + 2) for n in ("base", "a")]} for first in (0, 1)]
    t = [{"filter": "layers.2.", "value": 0.0}, {"value": 1.0}]
    document = {"merge_method": "slerp", "base_model": str(root / "base"), "slices": both, "parameters": {"t": t}}
    merged = run(document, tmp_path / "shared")
    base, a = (load_file(root / n / "model.safetensors") for n in ("base", "a"))
    for i, (model, own) in enumerate([(a, 0), (a, 1), (base, 1), (a, 2)]):
        torch.testing.assert_close(merged[UP.format(i)], model[UP.format(own)], rtol=1e-4, atol=1e-5)


def config_of(kind: str) -> Any:
    small = {"vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 4}
    if kind == "gpt2":
        return transformers.GPT2Config(vocab_size=32, n_embd=8, n_head=2, n_layer=4, n_positions=16)
    if kind == "qwen3":
        return transformers.Qwen3Config(
            **small,
            intermediate_size=8,
            num_key_value_heads=1,
            head_dim=4,
            use_sliding_window=True,
            max_window_layers=2,
        )
    return transformers.GPTNeoXConfig(**small, intermediate_size=8, max_position_embeddings=16)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gpt_neox"])
def test_a_stack_of_slices_loads_with_its_own_class(kind: str, tmp_path: Path) -> None:
    transformers.AutoModelForCausalLM.from_config(config_of(kind)).save_pretrained(tmp_path / "m")
    spans = [(0, 3), (1, 4)]
    slices = [{"sources": [source(tmp_path / "m", *span)]} for span in spans]
    run({"merge_method": "passthrough", "slices": slices}, tmp_path / "run")
    made, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert made.config.num_hidden_layers == 6
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    kinds = json.loads((tmp_path / "m/config.json").read_text()).get("layer_types")
    if kinds:
        assert made.config.layer_types == kinds[0:3] + kinds[1:4]
