"""Files of several mergekit documents, and keys that stand twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import RecipeError
from modicum.jobs import execute, plan
from modicum.recipe import override, parse, read
from modicum.weights.mergekit.several import stages_of
from support import tiny_llama

FILE = """
merge_method: slerp
base_model: left/half
models: [{model: left/half}, {model: c}]
parameters: {t: 0.25}
dtype: float32
---
name: left/half
merge_method: linear
models:
  - {model: a, parameters: {weight: 1}}
  - {model: b, parameters: {weight: 1}}
dtype: float32
---
name: unused
merge_method: passthrough
models: [{model: {model: {path: left/half}}}]
dtype: float32
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
    text = FILE
    for name in "abc":
        text = text.replace(f"model: {name}", f"model: {tmp_path}/{name}")
    (tmp_path / "several.yaml").write_text(text)
    return tmp_path / "several.yaml"


def test_documents_run_in_the_order_of_their_needs(file: Path, tmp_path: Path) -> None:
    recipe = parse(override(read(str(file)), ["seed=3", "shard_bytes=20000"]))
    assert [stage["name"] for stage in recipe.stages] == ["left-half", "unused", "final"]  # type: ignore[attr-defined]
    lines = "\n".join(plan(recipe))
    assert "final: merge after left-half" in lines
    execute(recipe, tmp_path / "run", quiet=True)
    folders = [tmp_path / "run/stages" / name / "model" for name in ("left-half", "unused", "final")]
    half, unused, final = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in folders)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(half[name], (a[name] + b[name]) / 2)
    assert torch.equal(half[name], unused[name])
    assert len(list(folders[2].glob("*.safetensors"))) > 1
    between = torch.dist(final[name], half[name]) < torch.dist(final[name], c[name])
    assert between
    assert not torch.equal(final[name], half[name])


def test_every_place_of_a_model_names_a_stage() -> None:
    document: dict[str, Any] = {
        "merge_method": "ties", "base_model": "x", "tokenizer_source": "x", "parameters": {"t": ["x"]},
        "tokenizer": {"source": "union", "tokens": {"x": {"source": "x"}}},
        "slices": [{"sources": [{"model": "x+org/lora", "layer_range": [0, 1]}], "base_model": "x"}],
    }  # fmt: skip
    first, made = stages_of([document, {"merge_method": "linear", "name": "x"}])
    assert (first["name"], made["name"]) == ("x", "final")
    assert made == {
        "merge_method": "ties", "base_model": "stage:x", "tokenizer_source": "stage:x", "parameters": {"t": ["x"]},
        "tokenizer": {"source": "union", "tokens": {"x": {"source": "stage:x"}}}, "name": "final",
        "slices": [{"sources": [{"model": "stage:x+org/lora", "layer_range": [0, 1]}], "base_model": "stage:x"}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([("a", "x"), ("a", "x")], "are called 'a'"),
        ([("", "x"), ("", "x")], "have no name"),
        ([("a", "b"), ("b", "a")], "a → b → a need each other in a circle"),
        ([("a", "a"), ("", "x")], "a → a need each other"),
    ],
)
def test_names_that_do_not_lead_to_an_order_are_refused(names: list[tuple[str, str]], message: str) -> None:
    documents = [
        {"merge_method": "linear", "models": [{"model": model}]} | ({"name": name} if name else {})
        for name, model in names
    ]
    with pytest.raises(RecipeError, match=message):
        parse({"job": "pipeline", "documents": documents})


def test_of_a_key_that_stands_twice_the_last_one_counts_and_the_plan_says_so(file: Path, tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    models = f"models: [{{model: {tmp_path}/a, parameters: {{weight: 0.5, weight: 2}}}}]\n"
    twice.write_text(
        f"merge_method: linear\ndtype: float16\n{models}parameters: {{normalize: false}}\ndtype: float32\n"
    )
    lines = plan(parse(read(str(twice))))
    assert "line 3: key 'weight' stands twice: the last one counts, as in mergekit" in lines
    assert "line 5: key 'dtype' stands twice: the last one counts, as in mergekit" in lines
    execute(parse(read(str(twice))), tmp_path / "run", quiet=True)
    name = "model.norm.weight"
    found = load_file(tmp_path / "run/model/model.safetensors")[name]
    torch.testing.assert_close(found, 2 * load_file(tmp_path / "a/model.safetensors")[name])
    twice.write_text("job: merge\nseed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match=r"twice.yaml, line 3: key 'seed' stands twice. Keep one."):
        read(str(twice))
    twice.write_text("job: merge\n---\njob: merge\n")
    with pytest.raises(RecipeError, match="holds 2 YAML documents, expected one"):
        read(str(twice))
    twice.write_text("---\njob: merge\n---\n")  # an empty document at the end is none
    assert read(str(twice)) == {"job": "merge"}
