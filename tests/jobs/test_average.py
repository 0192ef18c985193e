from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import CheckpointError, ModicumError, RecipeError
from modicum.jobs import average as average_job
from modicum.jobs import execute, plan
from modicum.jobs.averaging.folders import find_checkpoints, note_on_folders
from modicum.jobs.averaging.overlap import note_on_overlap
from modicum.jobs.data.rows import load_rows
from modicum.jobs.data.section import DataSection
from modicum.recipe import parse, parse_yaml
from modicum.record import read_record
from modicum.registry import averager
from modicum.weights import average
from modicum.weights.average import choose
from support import byte_tokenizer, tiny_llama
from weights.test_averagers import toys as toys


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


def test_folders_stand_for_their_checkpoints_and_have_an_order(tmp_path: Path) -> None:
    for step in (9, 10):
        (tmp_path / f"run/checkpoint-{step}").mkdir(parents=True)
    saved, run = [str(tmp_path / f"run/checkpoint-{step}") for step in (9, 10)], str(tmp_path / "run")
    assert find_checkpoints([run]) == saved and note_on_folders([run]) == []
    for file in ("model.safetensors", "adapter_model.bin"):
        (tmp_path / "run" / file).touch()
        assert find_checkpoints([run]) == saved
        assert "stands for its 2 checkpoints" in note_on_folders([run])[0]
        assert find_checkpoints([saved[0], run]) == [saved[0], run] and note_on_folders([saved[0], run]) == []
        (tmp_path / "run" / file).unlink()
    for number in (2, 10):
        (tmp_path / f"exp-{number}/model").mkdir(parents=True)
    found = find_checkpoints([f"{tmp_path}/exp-*/model"])
    assert [Path(path).parent.name for path in found] == ["exp-2", "exp-10"]
    odd = tmp_path / "exp-[v2] ?"
    for number in (3, 20):
        (odd / f"checkpoint-{number}").mkdir(parents=True)
    both = [str(odd / f"checkpoint-{number}") for number in (3, 20)]
    assert find_checkpoints([str(odd)]) == find_checkpoints([f"{odd}/checkpoint-*"]) == find_checkpoints(both) == both
    (tmp_path / "run/checkpoint-final").mkdir()
    with pytest.raises(CheckpointError, match="checkpoint-final, which has no number among numbered ones"):
        find_checkpoints([f"{run}/checkpoint-*"])


def test_what_is_searched_is_not_held_out(spoilt: Path, tmp_path: Path) -> None:
    section = {"path": str(spoilt / "text.jsonl")}
    data = {"job": "average", "checkpoints": [f"{spoilt}/checkpoint-*"], "method": "best", "data": section,
            "held_out": section}  # fmt: skip
    for work in (plan, lambda recipe: execute(recipe, tmp_path / "same", quiet=True)):
        with pytest.raises(RecipeError, match="All 3 rows of held_out are among those of data"):
            work(parse(data))
    (tmp_path / "partly.jsonl").write_text('{"text": "abababababababab"}\n{"text": "bbbbbbbb"}\n')
    partly = parse(data | {"held_out": {"path": str(tmp_path / "partly.jsonl")}})
    assert any("1 of 2 rows of held_out are among those of data" in line for line in plan(partly))
    execute(partly, tmp_path / "run", quiet=True)
    record = read_record(tmp_path / "run")
    assert record["metrics"]["averaging"]["measured_on"] == "held_out and data"
    assert any("1 of 2 rows" in note for note in record["notes"])


def test_the_model_s_class_tells_its_buffers(run_folder: Path) -> None:
    recipe = parse({"job": "average", "checkpoints": [f"{run_folder}/checkpoint-*"]})
    assert "model.rotary_emb.inv_freq" in average_job.open_checkpoints(recipe)[-1].buffers


def test_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No folder matches"):
        execute(parse({"job": "average", "checkpoints": [f"{tmp_path}/nope-*"]}), tmp_path / "run", quiet=True)


@pytest.mark.parametrize("name", [n for n in averager if not averager[n].facts.learns])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_coefficients_are_shares(name: str, n: int) -> None:
    coefficients = choose(["x"] * n, method=name).coefficients
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


@pytest.mark.usefixtures("toys")
def test_a_plan_draws_the_coefficients_that_the_run_takes(run_folder: Path, tmp_path: Path) -> None:
    """Whatever an averager draws comes from the recipe's seed, in ``check`` and in ``run``."""
    data = {"job": "average", "checkpoints": [f"{run_folder}/checkpoint-*"]}
    for name in (n for n in averager if not averager[n].facts.learns):
        method = {"name": name}
        for seed in (0, 3):
            recipe = parse(data | {"method": method, "seed": seed})
            told = plan(recipe)
            execute(recipe, tmp_path / f"{name}-{seed}", quiet=True)
            coefficients = read_record(tmp_path / f"{name}-{seed}")["metrics"]["coefficients"]
            assert [f"{checkpoint}: {c:.4g}" for checkpoint, c in coefficients.items()] == told[-3:]
    drawn = [read_record(tmp_path / f"toy_draw-{seed}")["metrics"]["coefficients"] for seed in (0, 3)]
    assert drawn[0] != drawn[1]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints of a run, of which the last is spoilt, and text that the first two know."""
    root = tmp_path_factory.mktemp("spoilt")
    model = tiny_llama(seed=0)
    ids = torch.tensor([[3 + ord(c) % 200 for c in "abababababababab"]])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in (1, 2, 3):
        for _ in range(8):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 3:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(root / f"checkpoint-{step}")
        byte_tokenizer().save_pretrained(root / f"checkpoint-{step}")
    (root / "text.jsonl").write_text('{"text": "abababababababab"}\n' * 3)
    (root / "held-out.jsonl").write_text('{"text": "babababababababa"}\n' * 3)
    return root


@pytest.mark.usefixtures("toys")
def test_a_learning_averager_runs_from_a_recipe(spoilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = {"path": str(spoilt / "text.jsonl")}
    data = {"job": "average", "checkpoints": [f"{spoilt}/checkpoint-*"], "method": "toy_descent", "data": section,
            "held_out": {"path": str(spoilt / "held-out.jsonl")}, "batch_size": 2}  # fmt: skip
    assert any("toy_descent learns the coefficients from 3 rows" in line for line in plan(parse(data)))
    assert list(parse(data).inputs())[-2:] == [section["path"], str(spoilt / "held-out.jsonl")]
    execute(parse(data), tmp_path / "run", quiet=True)
    metrics = read_record(tmp_path / "run")["metrics"]
    found = list(metrics["coefficients"].values())
    assert found[2] < 0.05
    assert metrics["loss"]["toy_descent"] < metrics["loss"]["mean of the last 3"]
    tensors = [load_file(spoilt / f"checkpoint-{step}/model.safetensors") for step in (1, 2, 3)]
    for name, tensor in load_file(tmp_path / "run/model/model.safetensors").items():
        torch.testing.assert_close(tensor, sum(c * t[name] for c, t in zip(found, tensors)), rtol=1e-4, atol=1e-5)
    assert (tmp_path / "run/model/tokenizer.json").exists()
    # Killed after the search: what was learnt is not searched again, and other processes take it as it is.
    before = (tmp_path / "run/model/model.safetensors").read_bytes()
    record = (tmp_path / "run/record.json").read_text()
    (tmp_path / "run/record.json").write_text(record.replace('"status": "done"', '"status": "running"'))

    def searched(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(average_job, "make_landscape", searched)
    execute(parse(data), tmp_path / "run", quiet=True)
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == before


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "toy_descent"}, "learns its coefficients from a loss on data, and none is given"),
        ({"held_out": {"path": "x"}}, "data is not given"),
    ],
)
def test_data_is_given_where_it_is_used(run_folder: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        parse({"job": "average", "checkpoints": [f"{run_folder}/checkpoint-*"]} | changes)
    assert "\n" not in str(error.value)


def test_pickled_checkpoints_are_averaged_when_allowed(tmp_path: Path) -> None:
    for seed in range(2):
        model = tiny_llama(seed=seed)
        model.save_pretrained(tmp_path / str(seed))
        (tmp_path / str(seed) / "model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / str(seed) / "pytorch_model.bin")
    data = {"job": "average", "checkpoints": [str(tmp_path / "0"), str(tmp_path / "1")], "exclude": "norm"}
    with pytest.raises(CheckpointError, match="allow_pickle: true"):
        execute(parse(data), tmp_path / "run", quiet=True)
    execute(parse(data | {"allow_pickle": True}), tmp_path / "run", quiet=True)
    assert read_record(tmp_path / "run")["status"] == "done"


@pytest.mark.parametrize("name", ["average-lora", "average-run", "train-ema"])
def test_shipped_recipes_are_valid_and_hold_out_what_they_do_not_search(name: str) -> None:
    data: dict[str, Any] = parse_yaml((files("modicum") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert parse(data).job == ("average" if name == "average-run" else "pipeline")
    for stage in data.get("stages", [data]):
        if stage["job"] == "average":
            searched, held_out = (load_rows(DataSection(**stage[key]), seed=0) for key in ("data", "held_out"))
            assert note_on_overlap(searched, held_out) == []
