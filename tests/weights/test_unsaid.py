"""What a folder leaves unsaid: settings of the class, copies of shared tables, weights that lie there twice."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modicum.architectures import is_tied_unsaid
from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.weights import Checkpoint
from weights.families import make_family


def merged(folder: Path) -> dict[str, Any]:
    return {"job": "merge", "experts": [str(folder / "a"), str(folder / "b")], "method": "linear"}


def listed(folder: Path) -> dict[str, Any]:
    models = [{"model": str(folder / name), "parameters": {"weight": 1}} for name in "ab"]
    return {"merge_method": "linear", "dtype": "float32", "models": models}


def change(folder: Path, *drop: str, **settings: Any) -> None:
    file = folder / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if key not in drop}
    file.write_text(json.dumps(config | settings))


ROTARY = ("rope_parameters", "rope_theta")
# What the first and the second model say, and what is to be said of it.
UNSAID = [
    ("llama", {}, {"sliding_window": 8}, "sliding_window (8, None)"),
    ("mistral", {"sliding_window": None}, {"sliding_window": 16}, "sliding_window (16, None)"),
    ("llama", {}, {"rope_theta": 1e6}, "rope_theta (1000000.0, 10000.0)"),
    (
        "llama",
        {"rope_theta": 1e4},
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "factor",
    ),
    ("gemma2", {"final_logit_softcapping": None}, {}, "final_logit_softcapping (30.0, None)"),
    ("llama", {}, {"rms_norm_eps": 1e-3}, "rms_norm_eps (0.001, 1e-06)"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "first", "second", "told"), UNSAID, ids=str)
@pytest.mark.parametrize("make", [merged, listed])
def test_settings_that_one_leaves_to_the_class_are_compared(
    family: str, first: dict[str, Any], second: dict[str, Any], told: str, make: Any, tmp_path: Path
) -> None:
    make_family(tmp_path, family)
    for name, settings in (("a", first), ("b", second)):
        change(tmp_path / name, *ROTARY, "rms_norm_eps", *first, *second, **settings)
    said = [line for line in plan(parse(make(tmp_path))) if "the result keeps" in line]
    assert any(told in line for line in said), said


@pytest.mark.filterwarnings("ignore")
def test_what_the_class_says_anyway_is_no_difference(tmp_path: Path) -> None:
    make_family(tmp_path, "llama")
    change(tmp_path / "b", "rms_norm_eps", *ROTARY, "attention_bias", "hidden_act", "head_dim")
    assert not [line for line in plan(parse(merged(tmp_path))) if "the result keeps" in line]


def test_weights_that_lie_there_twice_are_refused(tmp_path: Path) -> None:
    make_family(tmp_path, "llama", shards=True)
    tensors = {name: tensor.clone() for name, tensor in Checkpoint(tmp_path / "b").items()}
    save_file(tensors, tmp_path / "b/model.safetensors", {"format": "pt"})
    with pytest.raises(ModicumError, match="holds its weights twice: model.safetensors"):
        plan(parse(merged(tmp_path)))
    index = tmp_path / "a/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(Checkpoint(tmp_path / "a"), "model.safetensors")}))
    if not (tmp_path / "a/model.safetensors").exists():
        save_file(tensors, tmp_path / "a/model.safetensors", {"format": "pt"})
    assert Checkpoint(tmp_path / "a")  # an index of the one file is no second set


@pytest.mark.filterwarnings("ignore")
def test_copies_of_shared_tables_merge_with_files_that_have_none(tmp_path: Path) -> None:
    make_family(tmp_path, "t5")
    file = tmp_path / "b/model.safetensors"
    tensors = load_file(file)
    both = {f"{side}.embed_tokens.weight": tensors["shared.weight"].clone() for side in ("encoder", "decoder")}
    save_file(tensors | both, file, {"format": "pt"})
    execute(parse(merged(tmp_path)), tmp_path / "run", quiet=True)
    auto = transformers.AutoModelForSeq2SeqLM
    _, report = auto.from_pretrained(tmp_path / "run/model", output_loading_info=True)
    assert not report["missing_keys"]
    both["encoder.embed_tokens.weight"] += 1
    save_file(tensors | both, file, {"format": "pt"})
    with pytest.raises(ModicumError, match="has no tensor 'encoder.embed_tokens.weight'"):
        plan(parse(merged(tmp_path)))


def test_output_layers_that_a_class_ties_unsaid(tmp_path: Path) -> None:
    make_family(tmp_path, "gemma2")
    for name in "ab":
        change(tmp_path / name, "tie_word_embeddings")
    file = tmp_path / "b/model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    plan(parse(merged(tmp_path)))
    save_file(tensors | {"lm_head.weight": torch.zeros(24, 16)}, file, {"format": "pt"})
    with pytest.raises(ModicumError, match="ties 'lm_head.weight'"):
        plan(parse(merged(tmp_path)))


# Of several parts, the text among them having a class of its own; or nothing can be made of their class by itself.
COMPOSED = frozenset({"gemma3", "gemma3n", "gemma4", "mpt", "esm", "paligemma", "shieldgemma2", "t5gemma", "t5gemma2"})


@pytest.mark.filterwarnings("ignore")
def test_what_is_tied_unsaid_is_what_the_class_ties() -> None:
    auto = transformers.models.auto.modeling_auto
    kinds = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", "PRETRAINING")
    heads = {kind for name in kinds for kind in getattr(auto, f"MODEL_FOR_{name}_MAPPING_NAMES")}
    wrong = {}
    for kind in sorted(heads & set(CONFIG_MAPPING.keys()) - {"falcon"}):  # its published files hold their output layer
        config = None
        with suppress(Exception):  # of a class that needs the parts that it is made of
            config = CONFIG_MAPPING[kind]()
        if config is not None and (not config.sub_configs or kind in COMPOSED):
            tied = bool(getattr(config, "tie_word_embeddings", False))
            if tied != is_tied_unsaid(kind):
                wrong[kind] = tied
    assert not wrong
