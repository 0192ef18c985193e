"""Recipes of version 0.1.0 still run, and its run folders are still read, and recognised as finished."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from modicum import record
from modicum.jobs import execute, open_run, plan
from modicum.recipe import dump, override, parse, read
from modicum.record import read_record
from modicum.report import write

KEPT = Path(__file__).parent / "version_0_1_0"
NAMES = sorted(path.stem for path in KEPT.glob("recipes/*.yaml"))


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the kept folder, as the working directory: the recipes name their models relative to it."""
    folder = shutil.copytree(KEPT, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def recipe_of(name):
    return parse(read(f"recipes/{name}.yaml"), name)


def files(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_every_job_of_that_version_is_here():
    jobs = {read_record(KEPT / "runs" / name)["job"] for name in NAMES}
    assert jobs == {"average", "calibrate", "evaluate", "merge", "pipeline", "train"}
    assert sorted(path.name for path in KEPT.glob("runs/*")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_still_valid_and_can_be_planned(old, name):
    assert plan(recipe_of(name))
    # What the run resolved it to is a recipe too: `modicum run runs/NAME/recipe.yaml` repeats it.
    assert dump(parse(read(f"runs/{name}/recipe.yaml"))) == dump(recipe_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_finished_run_is_recognised(old, name):
    before = files(old)
    assert execute(recipe_of(name), old / "runs" / name, quiet=True).done
    assert files(old) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_report_is_still_written(old, name):
    text = write([old / "runs" / name], None).read_text()
    assert read_record(old / "runs" / name)["job"] in text


def test_one_report_tells_of_all(old):
    assert write([old / "runs" / name for name in NAMES], old / "all.html").exists()


@pytest.mark.parametrize("name", NAMES)
def test_another_recipe_is_not_taken_for_the_old_one(old, name):
    data = read(f"recipes/{name}.yaml")
    changed = parse(data | {"seed": 5}) if "job" in data else parse({"job": "merge", "mergekit": data, "seed": 5})
    run = open_run(changed, old / "runs" / name, quiet=True, on_change="keep")
    assert not run.done


def test_an_old_recipe_that_was_edited_afterwards_tells_nothing(old):
    folder = old / "runs" / "merge"
    resolved = yaml.safe_load((folder / "recipe.yaml").read_text())
    changed = override(resolved, ["method.density=0.25"])
    (folder / "recipe.yaml").write_text(yaml.safe_dump(changed))
    assert not open_run(parse(changed), folder, quiet=True, on_change="keep").done


def test_a_new_key_keeps_old_runs_unless_it_is_set(old):
    """A default that is added to a recipe's schema is no other recipe: here for keys that no version has yet."""
    stored = yaml.safe_load(Path("runs/average/recipe.yaml").read_text())
    inputs = read_record(old / "runs" / "average")["inputs"]

    def run(**settings):
        return record.Run("runs/average", job="average", inputs=inputs, quiet=True, on_change="keep", **settings)

    def complete(data):
        return {"new": False, **data}

    assert run(recipe={**stored, "new": False}, complete=complete).done
    assert not run(recipe={**stored, "new": True}, complete=complete).done
    assert not run(recipe={**stored, "new": False}).done


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("train-looped", "pipeline")])
def test_a_recipe_still_makes_what_it_made(old, name):
    made = execute(recipe_of(name), old / "again", quiet=True)
    before = read_record(old / "runs" / name)
    assert made.record["outputs"].keys() >= before["outputs"].keys()
    for path in (old / "runs" / name).rglob("*.safetensors"):
        again = load_file(old / "again" / path.relative_to(old / "runs" / name))
        for key, tensor in load_file(path).items():
            # Another processor may round matrix products differently.
            assert (again[key].float() - tensor.float()).abs().max() < 2e-2, (path, key)


def test_a_pipeline_goes_on_in_the_old_folder(old):
    """Its last stage is asked for more rows: the others, recognised, are not run again."""
    data = read("recipes/pipeline.yaml")
    data["stages"][2]["tasks"]["text"]["data"]["size"] = 5
    stamps = {path: path.stat().st_mtime_ns for path in old.glob("runs/pipeline/stages/*/*/*.safetensors")}
    run = execute(parse(data), Path("runs/pipeline"), quiet=True)
    assert [cell["n"] for cell in run.record["metrics"]["scores"]["cells"]] == [5, 5]
    assert stamps and all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert json.loads(Path("runs/pipeline/record.json").read_text())["status"] == "done"
