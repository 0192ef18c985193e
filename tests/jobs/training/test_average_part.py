"""The recipe's `average`: evaluated and saved beside the trained weights, and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.jobs.loading.models import load_model
from modicum.recipe import parse
from modicum.record import read_log, read_record
from modicum.weights import Checkpoint


def recipe(model: Path, root: Path, **changes: Any) -> dict[str, Any]:
    rows = root / "rows.jsonl"
    if not rows.exists():
        rows.write_text("\n".join(json.dumps({"text": f"{'abc' * 5} {i}"}) for i in range(12)))
    trainer = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2,
               "save_total_limit": 8, "lr_scheduler_type": "constant"}  # fmt: skip
    data = {"path": str(rows), "max_length": 32}
    return {
        "job": "train",
        "model": str(model),
        "data": data,
        "trainer": trainer | changes.pop("trainer", {}),
    } | changes


BOTH = {"moving": {"decay": 0.5}, "snapshots": {"keep": 3, "every": 2}}


def steps(folder: Path, adapter: str | None = None) -> list[dict[str, torch.Tensor]]:
    found = sorted((folder / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [dict(Checkpoint(path)) for path in found] if adapter is None else [
        {name: f.delta() for name, f in Checkpoint(path).adapter.factors.items()} for path in found]  # type: ignore[union-attr]  # fmt: skip


def test_averages_are_those_of_the_checkpoints_and_are_evaluated(tiny_model: Path, tmp_path: Path) -> None:
    average = {"moving": {"decay": 0.5, "every": 2}, "snapshots": {"keep": 3, "every": 2}}
    data = recipe(tiny_model, tmp_path, average=average, trainer={"eval_strategy": "steps", "eval_steps": 4})
    execute(parse(data | {"eval_data": data["data"]}), tmp_path / "run", quiet=True)
    saved = steps(tmp_path / "run")
    assert len(saved) == 4
    moving, ring = (load_file(tmp_path / f"run/{name}/model.safetensors") for name in ("moving_average", "snapshots"))
    for name, tensor in moving.items():
        mean = saved[0][name]
        for state in saved[1:]:
            mean = 0.5 * mean + 0.5 * state[name]
        torch.testing.assert_close(tensor, mean, rtol=1e-5, atol=1e-6)
        uniform = torch.stack([state[name] for state in saved[1:]]).mean(0)
        torch.testing.assert_close(ring[name], uniform, rtol=1e-5, atol=1e-6)
    record = read_record(tmp_path / "run")
    assert list(record["outputs"]) == ["model", "moving_average", "snapshots", "checkpoints"]
    assert record["metrics"]["average"] == {"moving_average": {"updates": 4}, "snapshots": {"steps": [4, 6, 8]}}
    lines = read_log(tmp_path / "run", "average")
    assert [line["step"] for line in lines] == [4, 8] and all("eval_loss_snapshots" in line for line in lines[1:])
    last = load_model(tmp_path / "run/moving_average")
    assert sum(p.numel() for p in last.parameters()) > 0
    assert torch.equal(load_file(tmp_path / "run/model/model.safetensors")[name], saved[-1][name])


@pytest.mark.parametrize("adapter", [None, {"rank": 2}])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    tiny_model: Path, tmp_path: Path, adapter: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modicum.jobs.training.parts.average import Average

    data = recipe(tiny_model, tmp_path, average=BOTH, **({"adapter": adapter} if adapter else {}))
    execute(parse(data), tmp_path / "whole", quiet=True)

    class StoppedError(Exception):
        pass

    real = Average.remember

    def stop(self: Average) -> dict[str, torch.Tensor]:
        found = real(self)
        if self.moving is not None and self.moving.updates == 6:
            raise StoppedError
        return found

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Average, "remember", stop)
        execute(parse(data), tmp_path / "stopped", quiet=True)
    execute(parse(data), tmp_path / "stopped", quiet=True)
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    for name in ("moving_average", "snapshots"):
        a, b = ((tmp_path / run / name / file).read_bytes() for run in ("whole", "stopped"))
        assert a == b, name


def test_of_an_adapter_the_products_are_averaged(tiny_model: Path, tmp_path: Path) -> None:
    data = recipe(tiny_model, tmp_path, average={"moving": {"decay": None, "every": 2}}, adapter={"rank": 4},
                  trainer={"max_steps": 4})  # fmt: skip
    execute(parse(data), tmp_path / "run", quiet=True)
    first, second = steps(tmp_path / "run", "adapter")
    found = {name: f.delta() for name, f in Checkpoint(tmp_path / "run/moving_average").adapter.factors.items()}  # type: ignore[union-attr]
    for name, delta in found.items():
        mean = (first[name] + second[name]) / 2
        U, S, Vh = torch.linalg.svd(mean)
        nearest = (U[:, :4] * S[:4]) @ Vh[:4]
        torch.testing.assert_close(delta, nearest, rtol=1e-3, atol=1e-5)
    load_model(tmp_path / "run/moving_average")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": {}}, "moving, snapshots or window"),
        ({"average": {"moving": {"decay": 1.0}}}, "decay"),
        ({"average": {"snapshots": {"keep": 3}}}, "every"),
        ({"average": {"snapshots": {"every": 2, "method": "greedy"}}}, "learns from data"),
        ({"average": {"window": 12}}, "save_total_limit keeps 8.*12 or more"),
        ({"average": {"moving": {}}, "trainer": {"fsdp": "full_shard", "fsdp_config": {"version": 1}}}, "FSDP 1"),
    ],
)
def test_wrong_averages_are_one_clear_line(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModicumError, match=message) as error:
        plan(parse(recipe(tiny_model, tmp_path, **changes)))
    assert "\n" not in str(error.value)
