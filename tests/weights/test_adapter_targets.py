"""Which modules an adapter's configuration names is PEFT's own rule, and its factors are those or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from modicum.errors import ModicumError
from modicum.weights import Checkpoint
from modicum.weights.adapter_targets import is_named

Q, K = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.k_proj"
MODULES = [Q, K, "model.layers.11.mlp.experts.2.up_proj", "lm_head", "q_proj", "encoder.block.1.layer.0.q"]
LISTS = st.lists(
    st.sampled_from(["q_proj", "k_proj", "layers.1.self_attn.k_proj", "up_proj", "lm_head", "q"]), max_size=3
)
EXPRESSIONS = st.sampled_from([r".*\.[qk]_proj", "q_proj", r".*layers\.1\..*", "lm_head|.*q"])
LAYERS = st.none() | st.integers(0, 2) | st.lists(st.integers(0, 11), max_size=2)
PATTERNS = st.none() | st.sampled_from(["layers", "block", "experts"]) | st.just(["layers", "block"])


@given(
    st.sampled_from(MODULES),
    LISTS.filter(bool) | EXPRESSIONS,
    st.none() | LISTS | EXPRESSIONS,
    LAYERS,
    PATTERNS,
)
def test_the_rule_is_that_of_peft(module: str, targets: Any, excluded: Any, layers: Any, pattern: Any) -> None:
    from types import SimpleNamespace

    from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists

    config = {"target_modules": targets, "exclude_modules": excluded, "layers_to_transform": layers,
              "layers_pattern": pattern}  # fmt: skip
    expected = check_target_module_exists(SimpleNamespace(**config, target_parameters=None), module)
    assert is_named(module, config) == (bool(expected) and not isinstance(expected, _ExcludedModule))


def adapter(folder: Path, module: str = Q, rank: int = 2, **config: Any) -> Path:
    folder.mkdir()
    factors = {"lora_A": torch.ones(rank, 4), "lora_B": torch.ones(4, rank)}
    save_file({f"base_model.model.{module}.{name}.weight": factor for name, factor in factors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_factors_under_names_that_peft_does_not_read_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    factors = {f"{Q}.{side}.weight": torch.ones(2, 2) for side in ("lora_A", "lora_B")}
    save_file(factors, folder / "adapter_model.safetensors")
    with pytest.raises(ModicumError, match=r"does not begin with 'base_model\.model\.', so that PEFT leaves it out"):
        Checkpoint(folder, base=tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, None),
        ({"target_modules": "all-linear"}, None),
        ({"r": 8, "rank_pattern": {"q_proj": 2}}, None),
        ({"target_modules": ["k_proj"]}, "does not name"),
        ({"layers_to_transform": [1]}, "does not name"),
        ({"exclude_modules": ["q_proj"]}, "does not name"),
        ({"target_modules": r".*k_proj"}, "does not name"),
        ({"r": 16}, "factors of rank 2, its adapter_config.json says r 16"),
        ({"rank_pattern": {"self_attn.q_proj": 4}}, "factors of rank 2, its adapter_config.json says r 4"),
        ({"r": "many"}, "is no number or table of numbers"),
        ({"target_modules": [5], "layers_pattern": {"a": 1}, "layers_to_transform": {}}, "does not name"),
    ],
)
def test_factors_that_the_configuration_does_not_say_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str | None
) -> None:
    (tmp_path / "base").mkdir()
    save_file({f"{Q}.weight": torch.eye(4)}, tmp_path / "base/model.safetensors")
    folder = adapter(tmp_path / "a", **config)
    if message is None:
        assert torch.equal(Checkpoint(folder, base=tmp_path / "base")[f"{Q}.weight"], torch.eye(4) + 4)
    else:
        with pytest.raises(ModicumError, match=message):
            Checkpoint(folder, base=tmp_path / "base")


def test_a_tower_s_layer_is_not_taken_for_the_text_s(tmp_path: Path) -> None:
    """Step 3.7's class calls its tower's layers as its file calls the text's, but for a prefix."""
    (tmp_path / "base").mkdir()
    tower = "vision_model.transformer.resblocks.0.attn.in_proj_weight"
    save_file({f"{Q}.weight": torch.eye(4), tower: torch.eye(12, 4)}, tmp_path / "base/model.safetensors")
    own = adapter(tmp_path / "a", Q.replace("model.", "model.language_model.", 1))
    assert torch.equal(Checkpoint(own, base=tmp_path / "base")[f"{Q}.weight"], torch.eye(4) + 4)
    other = adapter(tmp_path / "b", Q.replace("model.", "model.vision_model.", 1))
    with pytest.raises(ModicumError, match=r"'model\.vision_model.*' *, which its base .* merge .* with PEFT first"):
        Checkpoint(other, base=tmp_path / "base")
