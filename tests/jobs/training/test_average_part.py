"""The recipe's `average`: evaluated and saved beside the trained weights, and resumed bit for bit."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import ModicumError
from modicum.jobs import execute, plan
from modicum.jobs.loading.models import load_model
from modicum.jobs.training.average_callback import AverageCallback
from modicum.jobs.training.averages import Ring
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
        moving = self.callback.moving if self.callback is not None else None
        if moving is not None and moving.updates == 6:
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
        ({"average": {"snapshots": {"keep": 3, "every": 2, "method": {"name": "lawa", "last": 5}}}}, "last is 5"),
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


def test_a_ring_with_too_few_snapshots_is_noted_and_draws_follow_the_seed(tiny_model: Path, tmp_path: Path) -> None:
    lawa = {"snapshots": {"keep": 5, "every": 2, "method": {"name": "lawa", "last": 5}}}
    execute(parse(recipe(tiny_model, tmp_path, average=lawa)), tmp_path / "few", quiet=True)
    record = read_record(tmp_path / "few")
    assert any("took 4 snapshots, too few for lawa" in note for note in record["notes"])
    assert "snapshots" not in record["outputs"]
    states = [{"weight": torch.tensor([[float(i)]])} for i in range(8)]
    seen = set()
    for seed in range(4):
        model = torch.nn.Linear(1, 1, bias=False)
        ring = Ring(model, {}, keep=8, method="random", knobs={"k": 1, "seed": seed})
        ring.snapshots.load_state_dict({"steps": range(8), "states": states})
        with ring.in_place():
            seen.add(model.weight.item())
    assert len(seen) > 1


def test_the_callback_serves_a_bare_trainer(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = load_model(tiny_model, dtype="float32")
    rows = [{"input_ids": [1, 2, 3, i], "labels": [1, 2, 3, i]} for i in range(4, 8)]
    callback = AverageCallback({"moving": {"decay": 0.5}, "snapshots": {"keep": 2, "every": 1}})
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=3, report_to=[], save_strategy="no", use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback])
    trainer.train()
    assert callback.moving is not None and callback.moving.updates == 3 and callback.ring is not None
    assert {"eval_loss_moving_average", "eval_loss_snapshots"} <= trainer.evaluate().keys()
    last = model.get_input_embeddings().weight.clone()
    with callback.moving.in_place():
        assert not torch.equal(model.get_input_embeddings().weight, last)
    assert torch.equal(model.get_input_embeddings().weight, last)
    with pytest.raises(ModicumError, match="average"):
        AverageCallback({"moving": {"decay": 2.0}})


@pytest.mark.parametrize(("kind", "version", "message"), [("DEEPSPEED", 2, "DeepSpeed"), ("FSDP", 1, "FSDP 1")])
def test_what_a_launcher_brings_along_is_refused(
    monkeypatch: pytest.MonkeyPatch, kind: str, version: int, message: str
) -> None:
    from types import SimpleNamespace

    from modicum.jobs.training import average_callback

    class State(SimpleNamespace):
        _shared_state = {"known": True}  # noqa: RUF012

    told = partial(State, distributed_type=kind, fsdp_plugin=SimpleNamespace(fsdp_version=version))
    monkeypatch.setattr(State, "__init__", lambda self: self.__dict__.update(told.keywords))
    monkeypatch.setattr(average_callback, "AcceleratorState", State)
    callback = AverageCallback({"moving": {}})
    with pytest.raises(ModicumError, match=message):
        callback.make(torch.nn.Linear(1, 1))
