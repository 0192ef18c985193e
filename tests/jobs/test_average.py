from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.jobs import execute, plan
from modicum.recipe import parse
from modicum.record import read_record
from modicum.registry import averager
from modicum.weights import average
from support import tiny_llama


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    for step in (5, 10, 100):
        tiny_llama(seed=step).save_pretrained(root / f"checkpoint-{step}")
    return root


def test_a_pattern_stands_for_checkpoints_in_the_order_of_their_steps(run_folder: Path, tmp_path: Path) -> None:
    data = {"job": "average", "checkpoints": [f"{run_folder}/checkpoint-*"], "method": {"name": "lawa", "last": 2}}
    execute(parse(data), tmp_path / "run", quiet=True)
    coefficients = read_record(tmp_path / "run")["metrics"]["coefficients"]
    assert {Path(k).name: v for k, v in coefficients.items()} == {
        "checkpoint-5": 0.0,
        "checkpoint-10": 0.5,
        "checkpoint-100": 0.5,
    }
    a, b = (load_file(run_folder / f"checkpoint-{s}/model.safetensors") for s in (10, 100))
    for name, tensor in load_file(tmp_path / "run/model/model.safetensors").items():
        torch.testing.assert_close(tensor, ((a[name].double() + b[name].double()) / 2).to(tensor.dtype))
    assert any("checkpoint-100: 0.5" in line for line in plan(parse(data)))


def test_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No folder matches"):
        execute(parse({"job": "average", "checkpoints": [f"{tmp_path}/nope-*"]}), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("name", [n for n in averager if not averager[n].facts.learns])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_coefficients_are_shares(name: str, n: int) -> None:
    knobs = averager[name].knobs({"last": 1} if name == "lawa" else {})
    coefficients = averager[name].function(["x"] * n, **knobs)
    assert len(coefficients) == n
    assert sum(coefficients) == pytest.approx(1, abs=1e-12)
    assert min(coefficients) >= 0


def test_ema_is_the_average_updated_step_by_step() -> None:
    values = [3.0, -1.0, 4.0, 1.5]
    moving = values[0]
    for value in values[1:]:
        moving = 0.7 * moving + 0.3 * value
    coefficients = averager["ema"].function(values, decay=0.7)
    assert sum(c * v for c, v in zip(coefficients, values)) == pytest.approx(moving)


def test_wsm_of_a_linear_decay_is_the_mean() -> None:
    assert averager["wsm"].function(["x"] * 5, decay="linear") == pytest.approx([0.2] * 5)


def test_one_checkpoint_comes_out_bit_for_bit(run_folder: Path, tmp_path: Path) -> None:
    average([run_folder / "checkpoint-5"], tmp_path / "out")
    before, after = (load_file(f / "model.safetensors") for f in (run_folder / "checkpoint-5", tmp_path / "out"))
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_wrong_requests_are_refused(run_folder: Path, tmp_path: Path) -> None:
    checkpoint = run_folder / "checkpoint-5"
    with pytest.raises(RecipeError, match="last is 3, but there are 1"):
        average([checkpoint], tmp_path / "out", method="lawa", last=3)
    with pytest.raises(RecipeError, match="There are no checkpoints"):
        average([], tmp_path / "out")
    with pytest.raises(ModicumError, match="decay"):
        average([checkpoint], tmp_path / "out", method="ema", decay=1.0)
