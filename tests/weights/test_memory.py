"""The memory that a plan announces is that which is used, within a factor of two and the size of the blocks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modicum.registry import merge_method
from weights.test_merging import REQUIRED, number_of_experts

SIDE = 1800
PROGRAM = """
import json, sys, threading, time
from pathlib import Path
import torch
from modicum.weights import Checkpoint
from modicum.weights.merge import run_plan
from modicum.weights.plan import plan_merge
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
def used():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
def run(size, method, n, knobs, dtype):
    base = Checkpoint(folder / size / "base.safetensors")
    experts = [Checkpoint(folder / size / f"{i}.safetensors") for i in range(n)]
    plan = plan_merge(base, experts, method=method, knobs=knobs, dtype=dtype or None)
    most, done = used(), threading.Event()
    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, used())
            time.sleep(0.0005)
    start, thread = used(), threading.Thread(target=watch)
    thread.start()
    run_plan(plan, folder / f"{method}-{dtype}-{size}", workers=1, progress=False)
    done.set()
    thread.join()
    return most - start, plan.memory_bound(1)
for case in cases:
    run("small", *case)  # what is imported and compiled on the way
print(json.dumps([run("large", *case) for case in cases]))
"""
# Methods that hold more than blocks, and some that do not; others decompose matrices, which takes minutes here.
CASES = {
    "linear": {}, "ties": {}, "sce": {"select": 0.1}, "arcee_fusion": {}, "pcb": {}, "task_arithmetic": {},
    "model_stock": {"filter_wise": True}, "nuslerp": {"flatten": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for size, side in (("small", 50), ("large", SIDE)):
        (folder / size).mkdir()
        rng = torch.Generator().manual_seed(0)
        for name in ("base", "0", "1", "2"):
            tensor = torch.randn(side, side, generator=rng).bfloat16()
            save_file({"model.layers.0.mlp.up_proj.weight": tensor}, folder / size / f"{name}.safetensors")
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_the_bound_is_within_twice_what_is_used(models: Path) -> None:
    cases = []
    for method, more in CASES.items():
        n = 2 if merge_method[method].facts.most == 2 else number_of_experts(method)
        cases += [[method, n, REQUIRED.get(method, {}) | more, dtype] for dtype in ("", "float32")]
    # What is freed goes back at once, so that one method's memory is not taken for the next one's.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, str(models), json.dumps(cases)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    for case, (used, bound) in zip(cases, json.loads(told)):
        assert used <= bound <= 2 * used + (16 << 20), (case, used / SIDE**2, bound / SIDE**2)
