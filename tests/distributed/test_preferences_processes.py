"""Pairs under torchrun: two processes learn, log and measure what one does with twice the rows."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file

from modicum.record import read_log, read_record


def launch(recipe, folder, processes):
    """Train, with references of its own; return the adapter, the log and the record."""
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "modicum", "run", str(folder.parent / "recipe.yaml"), "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment["MODICUM_CACHE"] = str(folder.parent / f"cache-{folder.name}")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "adapter" / "adapter_model.safetensors"), folder


@pytest.mark.parametrize("kind", ["pairs", "rounds"])
def test_two_processes_learn_pairs_as_one_does(tiny_model, tmp_path, kind):
    for split, word in (("train", "say"), ("test", "tell")):
        for name in ("one", "two"):
            rows = [
                {"prompt": f"{word} {name} {i}", "chosen": "ab" * (1 + i % 3), "rejected": "xyz"} for i in range(16)
            ]
            (tmp_path / f"{name}-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def section(split, **more):
        parts = {name: str(tmp_path / f"{name}-{split}.jsonl") for name in ("one", "two")}
        return {"path": parts["one"]} if kind == "pairs" else {"mix": {"parts": parts, **more}}

    def recipe(pairs):
        trainer = {"max_steps": 4, "learning_rate": 3e-2, "optim": "sgd", "logging_steps": 1, "save_strategy": "no"}
        trainer |= {"per_device_train_batch_size": pairs, "per_device_eval_batch_size": pairs}
        rounds = {"rounds": {"count": 2, "eta": 4.0}} if kind == "rounds" else {}
        return {
            "job": "train", "model": str(tiny_model), "adapter": {"rank": 2}, "trainer": trainer,
            "objective": {"name": "dpo", "beta": 0.5},
            "data": section("train", **rounds) | {"max_length": 64}, "eval_data": section("test") | {"max_length": 64},
        }  # fmt: skip

    (two, second), (one, first) = launch(recipe(4), tmp_path / "two", 2), launch(recipe(8), tmp_path / "one", 1)
    assert two.keys() == one.keys()
    for name, tensor in two.items():
        assert torch.allclose(tensor, one[name], rtol=1e-3, atol=1e-6), name
    logs = [read_log(folder, "train") for folder in (first, second)]
    assert len(logs[0]) == 4 and logs[0][-1]["loss"] < logs[0][0]["loss"]
    for line, other in zip(*logs, strict=True):
        for column in ("loss", "accuracy", "margin", "reward_chosen", "logp_rejected", "length_chosen"):
            assert other[column] == pytest.approx(line[column], rel=1e-3, abs=1e-5), column
    metrics = [read_record(folder)["metrics"] for folder in (first, second)]
    assert metrics[1]["eval_accuracy"] == metrics[0]["eval_accuracy"]
    assert metrics[1]["eval_margin"] == pytest.approx(metrics[0]["eval_margin"], rel=1e-3)
    if kind == "rounds":
        assert metrics[1]["rounds"] == [pytest.approx(weights) for weights in metrics[0]["rounds"]]
        assert metrics[1]["dimensions"] == metrics[0]["dimensions"]
