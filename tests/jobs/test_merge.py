from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.record import read_record
from modicum.report import write
from support import tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        tiny_llama(seed=seed).save_pretrained(root / f"m{seed}")
    return [str(root / f"m{seed}") for seed in range(3)]


def recipe(models: list[str], **changes: object) -> dict[str, object]:
    return {
        "job": "merge",
        "base": models[0],
        "experts": models[1:],
        "method": {"name": "ties", "density": 0.5},
    } | changes


def test_a_merge_runs_records_layers_and_loads(models: list[str], tmp_path: Path) -> None:
    import transformers

    execute(parse(recipe(models)), tmp_path / "run", quiet=True)
    record = read_record(tmp_path / "run")
    assert record["outputs"] == {"model": "model"}
    layers = record["metrics"]["layers"]
    assert set(layers["norms"]) == {"m1", "m2"}
    assert set(layers["cosines"]) == {"m1|m2"}
    assert len(layers["names"]) == len(layers["conflict"]) == len(layers["norms"]["m1"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape[1] in (3, 4)


def test_pairs_of_many_experts_are_not_recorded(models: list[str], tmp_path: Path) -> None:
    # Their number grows as the square: a record of 2000 experts had gigabytes, which nothing reads again.
    execute(parse(recipe(models, experts=models[1:] * 20)), tmp_path / "run", quiet=True)
    layers = read_record(tmp_path / "run")["metrics"]["layers"]
    assert layers["cosines"] == {} and len(layers["norms"]) == 40 and len(layers["conflict"]) == len(layers["names"])
    assert "cosine" not in write([tmp_path / "run"]).read_text()


def test_a_finished_merge_whose_record_was_lost_is_made_again(models: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    execute(parse(recipe(models)), run, quiet=True)
    before = (run / "model/model.safetensors").read_bytes()
    record = (run / "record.json").read_text()
    (run / "record.json").write_text(record.replace('"status": "done"', '"status": "running"'))
    execute(parse(recipe(models)), run, quiet=True)
    assert (run / "model/model.safetensors").read_bytes() == before
    assert read_record(run)["status"] == "done"


def test_the_plan_tells_bytes_and_memory(models: list[str]) -> None:
    lines = plan(parse(recipe(models)))
    assert any("tensors from 3 models" in line for line in lines)
    assert any(line.startswith("reads ") and "writes" in line for line in lines)
    assert any("of memory" in line for line in lines)
    matrix = plan(parse(recipe(models, method="tsv")))
    assert any("embed_tokens.weight: mean of the deltas" in line for line in matrix)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "tis"}, "Did you mean 'ties'"),
        ({"method": {"name": "ties"}}, "'density' is missing"),
        ({"method": {"name": "ties", "density": 2}}, "density"),
        ({"experts": []}, "experts"),
        ({"dtype": "float8"}, "dtype"),
        ({"expert": []}, "Did you mean 'experts'"),
    ],
)
def test_a_wrong_recipe_is_refused(models: list[str], changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(recipe(models, **changes))


def test_an_adapter_stage_and_its_base_merge(models: list[str], tmp_path: Path) -> None:
    from weights.test_adapter import train_adapter

    expected = train_adapter(Path(models[0]), tmp_path / "adapter")
    data = recipe(models, experts=[str(tmp_path / "adapter")], method="task_arithmetic", dtype="float32")
    execute(parse(data), tmp_path / "run", quiet=True)
    for name, tensor in load_file(tmp_path / "run/model/model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name].float(), rtol=1e-5, atol=1e-6)


def test_diagnostics_are_recorded_when_asked_for(models: list[str], tmp_path: Path) -> None:
    execute(parse(recipe(models)), tmp_path / "plain", quiet=True)
    execute(parse(recipe(models, diagnostics=True)), tmp_path / "told", quiet=True)
    assert "diagnostics" not in read_record(tmp_path / "plain")["metrics"]
    metrics = read_record(tmp_path / "told")["metrics"]
    found = metrics["diagnostics"]
    assert set(found["spectra"]) == set(found["outliers"]) == {"m1", "m2"}
    assert len(found["names"]) == len(found["survival"]) == len(found["spectra"]["m1"])
    where = found["names"].index("model.layers.0.mlp.up_proj.weight")
    assert len(found["spectra"]["m1"][where]) == 8
    assert found["spectra"]["m1"][found["names"].index("model.embed_tokens.weight")] is None
    assert (tmp_path / "plain/model/model.safetensors").read_bytes() == (
        tmp_path / "told/model/model.safetensors"
    ).read_bytes()


def test_directions_that_nearly_coincide_are_noted(models: list[str], tmp_path: Path) -> None:
    execute(parse(recipe(models, method="tsv")), tmp_path / "close", quiet=True)
    record = read_record(tmp_path / "close")
    assert any("nearly coincide" in note and "whiten_rtol: 0.05" in note for note in record["notes"])
    assert min(v for v in record["metrics"]["diagnostics"]["weakest"] if v is not None) < 0.05
    execute(parse(recipe(models, method={"name": "tsv", "whiten_rtol": 0.05})), tmp_path / "cut", quiet=True)
    assert not read_record(tmp_path / "cut")["notes"]


@pytest.fixture(scope="module")
def adapters(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from weights.test_adapter import train_adapter

    root = tmp_path_factory.mktemp("adapters")
    train_adapter(Path(models[0]), root / "a", r=2)
    train_adapter(Path(models[0]), root / "b", r=3)
    return [str(root / "a"), str(root / "b")]


@pytest.mark.parametrize("method", ["tsv", {"name": "task_arithmetic", "scale": 0.5}])
def test_adapters_merge_into_an_adapter(models: list[str], adapters: list[str], tmp_path: Path, method: object) -> None:
    import peft
    import transformers

    data = {"job": "merge", "experts": adapters, "method": method, "output": "lora"}
    assert any("an adapter of rank 5 at most" in line for line in plan(parse(data)))
    execute(parse(data), tmp_path / "lora", quiet=True)
    record = read_record(tmp_path / "lora")
    assert record["outputs"] == {"adapter": "adapter"}
    assert record["metrics"]["rank"] == 5
    assert set(record["metrics"]["layers"]["norms"]) == {"a", "b"}
    execute(parse(recipe(models, experts=adapters, method=method, dtype="float32")), tmp_path / "full", quiet=True)
    whole = load_file(tmp_path / "full/model/model.safetensors")
    base = transformers.AutoModelForCausalLM.from_pretrained(models[0])
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "lora/adapter").merge_and_unload().state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(loaded[name].float(), tensor, rtol=1e-4, atol=1e-4)


def test_a_model_and_its_adapter_are_one_expert(models: list[str], adapters: list[str], tmp_path: Path) -> None:
    pairs = [f"{models[0]}+{adapter}" for adapter in adapters]
    data = {"job": "merge", "experts": pairs, "method": "tsv", "output": "lora", "dtype": "bfloat16"}
    assert list(parse(data).inputs()) == [models[0], adapters[0], models[0], adapters[1]]
    execute(parse(data), tmp_path / "lora", quiet=True)
    tensors = load_file(tmp_path / "lora/adapter/adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    elsewhere = {**data, "experts": [pairs[0], f"{models[1]}+{adapters[1]}"]}
    with pytest.raises(CheckpointError, match=r"b is an adapter of .*m1, expected .*m0"):
        execute(parse(elsewhere), tmp_path / "other", quiet=True)
    full = {**data, "output": "model", "base": models[0]}
    execute(parse(full), tmp_path / "full", quiet=True)
    assert read_record(tmp_path / "full")["outputs"] == {"model": "model"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": {"name": "ties", "density": 0.5}}, "ties needs whole matrices"),
        ({"method": "resm"}, "resm needs whole matrices"),
        ({"diagnostics": True}, "looks at whole matrices"),
        ({"output": "adapter"}, "output"),
        ({"experts": ["$M"]}, "is a full model, expected a LoRA adapter"),
        ({"base": "$M"}, "is an adapter of .*m0, expected .*m1"),
        ({"exclude": "proj"}, "leaves no weight"),
        ({"base_fingerprint": "0"}, "none is given"),
        ({"method": {"name": "task_arithmetic", "weights": [1, 2, 3]}}, "weights has 3 values for"),
        ({"method": {"name": "knots", "density": 0.5, "weights": [1]}}, "weights has 1 values for"),
    ],
)
def test_an_adapter_that_cannot_be_made_is_refused(
    models: list[str], adapters: list[str], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    data = {"job": "merge", "experts": adapters, "method": "tsv", "output": "lora"} | changes
    data = json.loads(json.dumps(data).replace("$M", models[1]))
    with pytest.raises(ModicumError, match=message):
        plan(parse(data))
    with pytest.raises(ModicumError, match=message) as error:
        execute(parse(data), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_model_is_noted(models: list[str], adapters: list[str]) -> None:
    lines = plan(parse(recipe(models, base=models[1], experts=adapters)))
    assert sum("is an adapter of" in line for line in lines) == 2
    assert not any("is an adapter of" in line for line in plan(parse(recipe(models, experts=adapters))))


def test_what_a_mergekit_file_says_itself_is_not_said_twice(models: list[str]) -> None:
    document = {"merge_method": "linear", "models": [{"model": models[0], "parameters": {"weight": 1.0}}]}
    for ours in ({"dtype": "float32"}, {"exclude": "norm"}, {"base": models[0]}, {"output": "lora"}):
        with pytest.raises(RecipeError, match="mergekit file"):
            parse({"job": "merge", "mergekit": document} | ours)


def test_keys_of_version_0_1_still_work(models: list[str]) -> None:
    old = parse(recipe(models, shard_size=7, pickled=True))
    assert (old.shard_bytes, old.allow_pickle) == (7, True)
    kit = {"merge_method": "linear", "models": [{"model": models[0], "parameters": {"weight": 1.0}}], "shard_size": 7}
    assert parse(kit).shard_bytes == 7


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"experts": ["$0", "$1"]}, "m0 is the base itself: it adds no difference"),
        ({"method": {"name": "task_arithmetic", "scale": 0}}, "the result is the base"),
        ({"method": {"name": "ties", "density": 0.5, "weights": [0, 0]}}, "the result is the base"),
        ({"experts": ["$0", "$1"], "method": "linear"}, None),  # the base takes no part
        ({}, None),
    ],
)
def test_what_adds_nothing_is_said(models: list[str], changes: dict[str, object], told: str | None) -> None:
    text = json.dumps(recipe(models) | changes)
    for i, model in enumerate(models):
        text = text.replace(f"${i}", model)
    found = [line for line in plan(parse(json.loads(text))) if "the base" in line]
    assert [told in line for line in found] == [True] if told else not found


def test_an_entry_of_a_list_is_what_an_error_tells_of(models: list[str]) -> None:
    with pytest.raises(RecipeError) as error:
        parse(recipe(models) | {"method": {"name": "ties", "density": [0, 1]}})
    assert "density.0: Input should be greater than 0, got 0." in str(error.value)
    assert "\n" not in str(error.value)
