"""The search of a merge's knobs: what is measured is what would be written, and a killed search goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.jobs.merge import make_plan
from modicum.jobs.merging.in_place import InPlace, moves
from modicum.jobs.merging.space import Space, Span
from modicum.recipe import parse
from modicum.record import read_record
from modicum.report import write
from modicum.weights import Checkpoint, merge
from support import byte_tokenizer, tiny_llama
from weights.families import make_family

pytest.importorskip("cmaes")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts and an adapter, and a text on which one direction helps."""
    import peft

    folder = tmp_path_factory.mktemp("models")
    base = tiny_llama(seed=0)
    for seed, name in enumerate(("base", "a", "b")):
        model = tiny_llama(seed=0)
        numbers = torch.Generator().manual_seed(seed)
        for (_, tensor), (_, origin) in zip(model.named_parameters(), base.named_parameters()):
            change = torch.randn(tensor.shape, generator=numbers) * (0.05 if seed else 0)
            tensor.data.copy_(origin.data + change)
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    wrapped.save_pretrained(folder / "lora")
    for name in ("texts", "others"):
        lines = [json.dumps({"text": f"{name} {i} and more of it"}) for i in range(6)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def recipe(models: Path, **more: Any) -> dict[str, Any]:
    merged = {"base": str(models / "base"), "experts": [str(models / "a"), str(models / "b")],
              "method": {"name": "task_arithmetic", "scale": 1.5}}  # fmt: skip
    task = {"kind": "perplexity", "data": {"path": str(models / "texts.jsonl"), "max_length": 32}}
    return {
        "job": "search", "merge": merged, "tasks": {"text": task}, "trials": 9, "population": 4,
        "knobs": {"scale": {"low": 0.01, "high": 2}, "weights": {"low": 0, "high": 1, "each": True}},
    } | more  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_the_best_merge_is_written_and_is_what_was_measured(models: Path, tmp_path: Path) -> None:
    held = {"kind": "perplexity", "data": {"path": str(models / "others.jsonl"), "max_length": 32}}
    document = recipe(models, held_out={"other": held})
    assert any("3 numbers: scale, weights[0], weights[1]" in line for line in plan(parse(document)))
    execute(parse(document), tmp_path / "run", quiet=True)
    found = read_record(tmp_path / "run")["metrics"]
    assert len(found["trials"]) == 9
    assert found["start"]["knobs"]["scale"] == 1.5
    assert found["best"]["value"] == min(trial["value"] for trial in found["trials"]) < found["start"]["value"]
    assert set(found["held_out"]["best"]) == {"other"}
    knobs = found["best"]["knobs"]
    merge(models / "base", [models / "a", models / "b"], tmp_path / "again", method="task_arithmetic",
          scale=knobs["scale"], weights=[knobs["weights[0]"], knobs["weights[1]"]])  # fmt: skip
    expected = Checkpoint(tmp_path / "again")
    for name, tensor in Checkpoint(tmp_path / "run/model").items():
        assert torch.equal(tensor, expected[name])
    task = document["tasks"]["text"]
    evaluation = {"job": "evaluate", "model": str(tmp_path / "run/model"), "tasks": {"text": task}}
    execute(parse(evaluation), tmp_path / "evaluated", quiet=True)
    cell = read_record(tmp_path / "evaluated")["metrics"]["cells"][0]
    assert cell["value"] == found["best"]["value"]
    page = write([tmp_path / "run"]).read_text()
    assert "Searched merges" in page
    assert "Of 9 merges the best scores" in page


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["fewer layers", "more tokens", "bfloat16", "sharded float16 of adapters"])
def test_a_result_of_another_shape_than_the_models_is_what_is_measured(models: Path, tmp_path: Path, case: str) -> None:
    base, a, b, lora = (str(models / name) for name in ("base", "a", "b", "lora"))
    knobs: dict[str, Any] = {"weights": {"low": 0.1, "high": 1, "each": True}}
    merged: dict[str, Any] = {"base": base, "experts": [a, b], "method": "task_arithmetic"}
    if case == "fewer layers":
        sources = [{"model": one, "layer_range": [1, 2], "parameters": {"weight": 0.5}} for one in (a, b)]
        merged = {"merge_method": "linear", "slices": [{"sources": sources}]}
    elif case == "more tokens":
        tokenizer, model = byte_tokenizer(), transformers.AutoModelForCausalLM.from_pretrained(b)
        tokenizer.add_tokens(["more"])
        model.resize_token_embeddings(272)
        for part in (tokenizer, model):
            part.save_pretrained(tmp_path / "other")
        merged = {"experts": [a, str(tmp_path / "other")], "method": "linear", "tokenizer": "union"}
    elif case == "bfloat16":
        merged["dtype"] = "bfloat16"
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float16)
        model.save_pretrained(tmp_path / "half", max_shard_size="40KB")
        byte_tokenizer().save_pretrained(tmp_path / "half")
        half = str(tmp_path / "half")
        merged = {"base": half, "experts": [f"{half}+{lora}"] * 2, "method": "task_arithmetic"}
    document = recipe(models, merge=merged, knobs=knobs, trials=3)
    assert plan(parse(document))
    execute(parse(document), tmp_path / "run", quiet=True)
    evaluation = {"job": "evaluate", "model": str(tmp_path / "run/model"), "tasks": document["tasks"]}
    execute(parse(evaluation), tmp_path / "evaluated", quiet=True)
    (cell,) = read_record(tmp_path / "evaluated")["metrics"]["cells"]
    assert cell["value"] == read_record(tmp_path / "run")["metrics"]["best"]["value"]
    assert not (tmp_path / "run/trial").exists()


def test_check_refuses_a_class_without_places_for_the_merge_s_tensors(tmp_path: Path) -> None:
    sizes = {"vocab_size": 264, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}  # fmt: skip
    config = transformers.GraniteMoeConfig(**sizes)
    for name in ("base", "a", "b"):
        transformers.GraniteMoeForCausalLM(config).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "some"}))
    with pytest.raises(ModicumError, match="GraniteMoeForCausalLM has no place for 'model.layers.0.block_sparse_moe"):
        plan(parse(recipe(tmp_path)))


@pytest.mark.filterwarnings("ignore")
def test_a_killed_search_goes_on_where_it_was(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = recipe(models)
    execute(parse(document), tmp_path / "whole", quiet=True)
    counted: list[int] = []
    real = InPlace.merge

    def counting(self: InPlace, plan: Any) -> None:
        counted.append(1)
        if len(counted) == 6:
            raise KeyboardInterrupt
        real(self, plan)

    monkeypatch.setattr(InPlace, "merge", counting)
    with pytest.raises(KeyboardInterrupt):
        execute(parse(document), tmp_path / "killed", quiet=True)
    execute(parse(document), tmp_path / "killed", quiet=True)
    assert len(counted) == 6 + 4  # five were kept
    whole, killed = (read_record(tmp_path / name)["metrics"] for name in ("whole", "killed"))
    assert whole["trials"] == killed["trials"]
    assert Checkpoint(tmp_path / "whole/model").identity == Checkpoint(tmp_path / "killed/model").identity


def test_knobs_may_differ_by_layer(models: Path) -> None:
    merged = make_plan(parse(recipe(models)["merge"] | {"job": "merge"}))
    space = Space(merged, {"scale": Span(low=0, high=1, layers=2), "weights": Span(low=0, high=2, each=True)})  # type: ignore[arg-type]
    assert space.names == ["scale@0", "scale@1", "weights[0]", "weights[1]"]
    assert space.start == [1.0, 1.0, 0.5, 0.5]
    found = {step.name: step.knobs for step in space.plan_at([0.2, 0.8, 0.25, 0.5]).steps}
    assert found["model.embed_tokens.weight"] == {"scale": 0.2, "weights": [0.5, 1.0]}
    assert found["model.norm.weight"]["scale"] == 0.8
    assert found["model.layers.0.mlp.up_proj.weight"]["scale"] == 0.2
    assert found["model.layers.1.mlp.up_proj.weight"]["scale"] == 0.8


def test_what_stays_as_in_the_base_is_not_searched(models: Path) -> None:
    document = recipe(models)["merge"] | {"job": "merge", "exclude": "embed|lm_head|layers.0"}
    space = Space(make_plan(parse(document)), {"scale": Span(low=0, high=2)})  # type: ignore[arg-type]
    assert space.start == [0.75]
    found = {step.name: step.knobs["scale"] for step in space.plan_at([0.25]).steps}
    assert found.pop("model.layers.1.mlp.up_proj.weight") == 0.5
    assert found["model.embed_tokens.weight"] == found["model.layers.0.mlp.up_proj.weight"] == 1
    passed = {"merge_method": "passthrough", "models": [{"model": str(models / "a"), "parameters": {"scale": 1.0}}]}
    alone = Space(make_plan(parse(passed)), {"scale": Span(low=0, high=2)})  # type: ignore[arg-type]
    assert {step.knobs["scale"] for step in alone.plan_at([0.25]).steps} == {0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"knobs": {"sacle": {"low": 0, "high": 1}}}, "has no knob 'sacle'. Did you mean 'scale'"),
        ({"knobs": {"scale": {"low": 1, "high": 1}}}, "low is 1"),
        ({"knobs": {"scale": {"low": 0, "high": 1, "log": True}}}, "log needs numbers above 0"),
        (
            {"merge": {"method": {"name": "ties", "density": 0.5}}, "knobs": {"density": {"low": 0, "high": 1}}},
            "density",
        ),
    ],
)
def test_check_refuses_what_cannot_be_searched(models: Path, change: dict[str, Any], message: str) -> None:
    document = recipe(models)
    document |= change | {"merge": document["merge"] | change.get("merge", {})}
    with pytest.raises(ModicumError, match=message):
        plan(parse(document))


def test_only_what_adapters_change_is_made_again(models: Path) -> None:
    document = {"job": "merge", "base": str(models / "base"), "experts": [str(models / "lora")] * 2,
                "method": "task_arithmetic"}  # fmt: skip
    moving = {step.name for step in make_plan(parse(document)).steps if moves(step)}  # type: ignore[union-attr]
    assert moving
    assert all("q_proj" in name for name in moving)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["mixtral", "qwen3moe", "gpt2", "tied", "phi3"])
def test_what_lies_in_memory_is_what_is_written(family: str, tmp_path: Path) -> None:
    make_family(tmp_path, family)
    document = {"job": "merge", "base": str(tmp_path / "base"), "experts": [str(tmp_path / "a"), str(tmp_path / "b")],
                "method": {"name": "ties", "density": 0.5}}  # fmt: skip
    merged: Any = make_plan(parse(document))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    InPlace(model, merged).merge(merged)
    execute(parse(document), tmp_path / "run", quiet=True)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
