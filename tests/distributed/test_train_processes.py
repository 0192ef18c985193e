"""A recipe under torchrun: one run folder, written by the first process, and the same weights on both."""

import json
import os
import subprocess
import sys

import torch
import yaml
from safetensors.torch import load_file

from modicum.record import read_record


def launch(recipe, folder, processes):
    (folder.parent / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "modicum", "run", str(folder.parent / "recipe.yaml"), "-o", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return load_file(folder / "stages" / "expert" / "adapter" / "adapter_model.safetensors")


def test_two_processes_train_the_same_adapter_as_one(tiny_model, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "abc"}) for i in range(16)))
    train = {
        "name": "expert",
        "job": "train",
        "model": str(tiny_model),
        "data": {"path": str(rows), "max_length": 64},
        "adapter": {"rank": 2},
        "trainer": {"max_steps": 3, "learning_rate": 1e-2, "optim": "sgd"},
    }
    merge = {"name": "merged", "job": "merge", "base": str(tiny_model), "experts": ["stage:expert"], "method": "linear"}

    def recipe(rows_per_process):
        trainer = train["trainer"] | {"per_device_train_batch_size": rows_per_process}
        return {"job": "pipeline", "stages": [train | {"trainer": trainer}, merge]}

    two = launch(recipe(4), tmp_path / "two", 2)
    one = launch(recipe(8), tmp_path / "one", 1)
    assert two.keys() == one.keys()
    for name, tensor in two.items():
        assert torch.allclose(tensor, one[name], rtol=1e-3, atol=1e-6), name
    assert read_record(tmp_path / "two")["status"] == "done"
    assert (tmp_path / "two" / "stages" / "merged" / "model" / "model.safetensors").exists()
