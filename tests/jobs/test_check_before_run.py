"""What a run would refuse once its models are loaded, its check refuses; transcripts are of the same weights."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from modicum.errors import CheckpointError, RecipeError
from modicum.inputs import look
from modicum.jobs import attack as attacking
from modicum.jobs import execute, plan
from modicum.jobs.loading import models
from modicum.models import convert_to_zero_token
from modicum.recipe import parse
from modicum.record import Run
from support import byte_tokenizer, tiny_llama


@pytest.fixture
def world(tmp_path, monkeypatch):
    tiny_llama(seed=0).save_pretrained(tmp_path / "base")
    convert_to_zero_token(tiny_llama(), n_cycles=2, n_head=0, zero_token=False).save_pretrained(tmp_path / "plain")
    convert_to_zero_token(tiny_llama(), n_cycles=2, n_head=0).save_pretrained(tmp_path / "looped")
    for name in ("base", "plain", "looped"):
        byte_tokenizer().save_pretrained(tmp_path / name)
    for name, count in (("one", 1), ("many", 4)):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "abcdefgh"}\n' * count)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path


def calibrated(model, data, *criteria):
    recipe = {"job": "calibrate", "model": model, "data": {"path": f"{data}.jsonl", "max_length": 32}}
    return parse(recipe | {"criteria": list(criteria)})


def test_criteria_that_leave_nothing_are_found_by_the_check(world):
    with pytest.raises(RecipeError, match="there is one row. Give more data"):
        plan(calibrated("looped", "one", "gate"))
    with pytest.raises(RecipeError, match="No criterion of the recipe fits the model"):
        plan(calibrated("plain", "many", "zero_attention"))
    assert plan(calibrated("looped", "many", "zero_attention", "gate"))
    assert plan(calibrated("plain", "one", "zero_attention", "confidence"))


def test_prompts_without_tokens_are_found_by_the_check(world, monkeypatch):
    experts = [{"source_model": "base", "positive_prompts": [text]} for text in ("a", "")]
    recipe = parse({"base_model": "base", "gate_mode": "hidden", "experts": experts})

    class Tokenizer(SimpleNamespace):
        def __call__(self, text, **_):
            return {"input_ids": [1] * len(text)}

    monkeypatch.setattr(models, "load_tokenizer", lambda *_, **__: Tokenizer(bos_token=None))
    with pytest.raises(RecipeError, match="The prompt '' has no tokens. Change it"):
        plan(recipe)


def test_transcripts_of_an_adapter_are_of_its_base_too(world):
    (world / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "base_model_name_or_path": "../base"}
    (world / "adapter/adapter_config.json").write_text(json.dumps(config))
    with Run("before", job="attack", recipe={}, inputs=look(["adapter"]), quiet=True):
        pass
    goals = {"goals": {"path": "one.jsonl"}, "benign": {"path": "many.jsonl"}}
    recipe = parse({"job": "attack", "targets": {"a": "adapter"}, "transcripts": "before", **goals})
    attacking._same_models(recipe, look(["adapter"]).hashes)
    weights = world / "base/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(CheckpointError, match=r"base of target 'a' is not what it was when before was drawn"):
        attacking._same_models(recipe, look(["adapter"]).hashes)


@pytest.mark.parametrize("inside", [False, True])
def test_devices_that_cannot_be_used_are_refused_before_anything_begins(world, inside):
    merge = {"job": "merge", "experts": ["base", "base"], "method": "linear", "device": "cudaa"}
    tasks = {"read": {"kind": "perplexity", "data": "many.jsonl"}}
    search = {"job": "search", "merge": merge, "knobs": {"scale": {"low": 0, "high": 1}}, "tasks": tasks}
    recipe = parse(search if inside else merge)
    for act in (plan, lambda recipe: execute(recipe, "out", quiet=True)):
        with pytest.raises(RecipeError, match="device is 'cudaa', which cannot be used here: Expected one of cpu"):
            act(recipe)
    assert not (world / "out").exists()
