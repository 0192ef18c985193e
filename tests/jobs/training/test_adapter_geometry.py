"""How an adapter's directions lie: to where they were, and to what a full fine-tune changed."""

import json
import shutil

import pytest
import torch

from modicum.errors import CheckpointError, RecipeError
from modicum.jobs import execute
from modicum.jobs.training.adapter_geometry import change_between, geometry
from modicum.random import generator
from modicum.recipe import parse
from modicum.weights.checkpoint import Checkpoint

EYE = torch.eye(6)
NONE = torch.zeros(6, 2)


def test_angles_to_a_known_change():
    # The change maps inputs 0 and 1 to outputs 4 and 5, and a little of input 2, which rank 2 leaves out.
    delta = 3 * torch.outer(EYE[4], EYE[0]) + 2 * torch.outer(EYE[5], EYE[1]) + 0.1 * torch.outer(EYE[3], EYE[2])
    start = {"m": (EYE[[0, 2]], NONE)}
    final = {"m": (torch.stack([EYE[0], EYE[1] + EYE[2]]), EYE[:, [5, 4]])}
    found = geometry(start, final, {}, change=lambda name: {"m": delta}[name])
    assert found["start_A"] == [pytest.approx(45, abs=0.01)]  # one of two directions at a right angle
    assert found["end_A"] == [pytest.approx(22.5, abs=0.01)]  # one at half of it
    assert found["start_B"] == [None] and found["end_B"] == [pytest.approx(0, abs=0.01)]
    assert found["turned_A"] == [pytest.approx(22.5, abs=0.01)] and found["turned_B"] == [None]
    assert geometry(start, final, {}).keys() == {"modules", "turned_A", "turned_B"}


def test_a_fine_tune_that_left_a_module_as_it_was_gives_no_angle():
    factors = {"m": (EYE[:2], EYE[:, :2])}
    found = geometry(factors, factors, {}, change=lambda _: torch.zeros(6, 6))
    assert found["end_A"] == found["end_B"] == [None] and found["turned_A"] == [0.0]


def test_a_change_is_read_as_the_layer_applies_it(tmp_path):
    from safetensors.torch import save_file

    weights = torch.randn(2, 4, 3, generator=generator(0, "weights"))
    for name, weight in zip(("base", "full"), weights):
        save_file({"h.w.weight": weight.contiguous()}, tmp_path / f"{name}.safetensors")
    base, full = (Checkpoint(tmp_path / f"{name}.safetensors") for name in ("base", "full"))
    assert torch.equal(change_between(base, full)("h.w"), weights[1] - weights[0])
    assert torch.equal(change_between(base, full, transposed=True)("h.w"), (weights[1] - weights[0]).mT)


def stages(model, path, **adapter):
    shared = {"job": "train", "model": str(model), "data": {"path": str(path)}}
    trainer = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    full = {"name": "full", **shared, "trainer": trainer}
    lora = {"name": "lora", **shared, "trainer": trainer, "adapter": {"rank": 2, "compare": "stage:full", **adapter}}
    return parse({"job": "pipeline", "stages": [full, lora]})


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {n} of a few"}) + "\n" for n in range(8)))
    return path


def test_a_pipeline_compares_an_adapter_to_a_full_fine_tune_before_it(tiny_model, rows, tmp_path):
    run = execute(stages(tiny_model, rows, init="lora_one"), tmp_path / "run", quiet=True)
    [path] = run.folder.glob("stages/lora/adapter/adapter_geometry.json")
    found = json.loads(path.read_text())
    # What the first gradient points to is what a few full steps do.
    random = execute(stages(tiny_model, rows, init="default"), tmp_path / "other", quiet=True)
    [path] = random.folder.glob("stages/lora/adapter/adapter_geometry.json")
    other = json.loads(path.read_text())
    assert all(0 <= angle <= 90 for angle in found["end_A"] + found["start_B"])
    assert sum(found["start_A"]) < 0.9 * sum(other["start_A"]) and set(other["start_B"]) == {None}


@pytest.mark.parametrize(
    ("adapter", "error", "message"),
    [
        ({}, RecipeError, "adapter.compare needs a start that is known. Set adapter.init"),
        ({"init": "rslora"}, RecipeError, "the start of rslora is PEFT's own"),
        ({"init": "default", "compare": "builtin:smollm2-135m-instruct"}, CheckpointError, "as the adapter's base has"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(tiny_model, rows, tmp_path, adapter, error, message):
    with pytest.raises(error, match=message):
        execute(stages(tiny_model, rows, **adapter), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "stages" / "lora" / "checkpoints").exists()


def test_a_run_that_goes_on_measures_what_one_in_peace_does(tiny_model, rows, tmp_path):
    trainer = {"max_steps": 2, "save_steps": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 2}
    recipe = {"job": "train", "model": str(tiny_model), "data": {"path": str(rows), "max_length": 32},
              "adapter": {"rank": 2, "init": {"name": "gaussian"}}, "trainer": trainer}  # fmt: skip
    run = execute(parse(recipe), tmp_path / "run", quiet=True).folder
    file = run / "adapter" / "adapter_geometry.json"
    before = file.read_bytes()
    shutil.rmtree(run / "adapter")
    execute(parse(recipe), run, quiet=True)
    assert file.read_bytes() == before
