"""Two processes that were killed and started again are the two that were not; another number of them is refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from modicum.record import read_lines, read_record

pytestmark = pytest.mark.slow


def launch(recipe, folder, processes):
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "modicum", "run", str(path), "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def losses(folder):
    return [(line["step"], line["loss"]) for line in read_lines(folder / "log.jsonl") if line["event"] == "train"]


def test_two_processes_go_on_exactly(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "abc" * i}) for i in range(1, 13)))
    trainer = {"max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1}
    recipe = {
        "job": "train",
        "model": str(tiny_model),
        "data": {"path": str(rows), "max_length": 64},
        "objective": "dropout",
        "gradient": "adagc",
        "trainer": trainer | {"learning_rate": 1e-2, "logging_steps": 2, "save_total_limit": 9},
    }
    recipe["adapter"] = {"rank": 2, "init": {"name": "adalora", "warmup": 0.0, "settled": 0.2}}
    whole = tmp_path / "whole"
    done = launch(recipe, whole, 2)
    assert done.returncode == 0, done.stderr[-2000:]
    for step in (2, 5):
        killed = tmp_path / f"killed-{step}"
        shutil.copytree(whole, killed)
        shutil.rmtree(killed / "adapter")
        for path in (killed / "checkpoints").iterdir():
            if int(path.name.rpartition("-")[2]) > step:
                shutil.rmtree(path)
        record = read_record(killed) | {"status": "running", "outputs": {}}
        (killed / "record.json").write_text(json.dumps(record))
        refused = launch(recipe, killed, 1)
        assert refused.returncode == 2 and f"checkpoint-{step} was saved by 2 processes" in refused.stderr
        again = launch(recipe, killed, 2)
        assert again.returncode == 0, again.stderr[-2000:]
        name = "adapter/adapter_model.safetensors"
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
        assert losses(killed) == losses(whole)
        assert read_record(killed)["metrics"] == read_record(whole)["metrics"]
