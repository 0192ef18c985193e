import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from modicum import registry
from modicum.errors import ModicumError, RecipeError, UnsupportedError
from modicum.jobs import execute, plan
from modicum.jobs.stages.references import resolve
from modicum.recipe import parse
from modicum.record import read_record


def stages(model, rows):
    train = {
        "job": "train",
        "model": str(model),
        "data": {"path": str(rows), "max_length": 64},
        "adapter": {"rank": 2},
        "trainer": {"max_steps": 4, "learning_rate": 1e-2, "save_steps": 1, "per_device_train_batch_size": 4},
    }
    return [
        {"name": "first", **train},
        {"name": "second", **train, "seed": 1},
        {
            "name": "merged",
            "job": "merge",
            "base": str(model),
            "experts": ["stage:first", "stage:second/adapter"],
            "method": {"name": "ties", "density": 0.5},
        },
        {
            "name": "scores",
            "job": "evaluate",
            "models": {"first": "stage:first", "merged": "stage:merged"},
            "tasks": {"say": {"kind": "exact_match", "data": {"path": str(rows), "size": 6}, "max_new_tokens": 4}},
        },
    ]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"say {i}", "completion": "abc"}) for i in range(16)))
    return path


def outputs(folder):
    """Bytes of everything that the stages made for others, and the scores."""
    files = [*folder.glob("stages/*/adapter/*"), *folder.glob("stages/*/model/*")]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    cells = read_record(folder / "stages" / "scores")["metrics"]["cells"]
    found["cells"] = [{key: value for key, value in cell.items() if key != "seconds"} for cell in cells]
    return found


def test_stages_use_each_other_and_finished_ones_are_skipped(tiny_model, rows, tmp_path):
    data = {"job": "pipeline", "stages": stages(tiny_model, rows)}
    run = execute(parse(data), tmp_path / "r", quiet=True)
    assert [stage["status"] for stage in run.record["stages"]] == ["done"] * 4
    assert {cell["model"] for cell in run.record["metrics"]["scores"]["cells"]} == {"first", "merged"}
    before = outputs(run.folder)
    stamps = {file: file.stat().st_mtime_ns for file in run.folder.rglob("*.safetensors")}
    assert execute(parse(data), tmp_path / "r", quiet=True).done

    # Another merge: what was trained stays, what depends on the merge is made again.
    data["stages"][2]["method"]["density"] = 1.0
    again = execute(parse(data), tmp_path / "r", quiet=True)
    changed = outputs(again.folder)
    assert changed["stages/merged/model/model.safetensors"] != before["stages/merged/model/model.safetensors"]
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in stamps.items() if "merged" not in file.parts)


def test_a_killed_pipeline_ends_with_the_same_bytes(tiny_model, rows, tmp_path):
    data = {"job": "pipeline", "stages": stages(tiny_model, rows)}
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    # Each in a process of its own: what other tests left in this one must not stand for what a kill changed.
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    whole = tmp_path / "whole"
    started = [sys.executable, "-m", "modicum", "run", str(tmp_path / "p.yaml"), "--out", str(whole)]
    subprocess.run(started, check=True, capture_output=True, env=environment)
    command = [sys.executable, "-m", "modicum", "run", str(tmp_path / "p.yaml"), "--out", str(tmp_path / "killed")]
    moments = [
        tmp_path / "killed" / "stages" / "first" / "checkpoints" / "checkpoint-2",
        tmp_path / "killed" / "stages" / "second" / "adapter",
    ]
    for moment in moments:
        # No fork of this process, whose threads of torch would not be there.
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        while not moment.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert moment.exists()
    subprocess.run(command, check=True, capture_output=True, env=environment)
    ended, expected = outputs(tmp_path / "killed"), outputs(whole)
    assert [name for name in expected | ended if ended.get(name) != expected.get(name)] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[2].update(experts=["stage:frist"]), "Did you mean 'first'?"),
        (lambda s: s[0].update(model="stage:merged"), "no earlier stage"),
        (lambda s: s[2].update(experts=["stage:first/adaptr"]), "no output 'adaptr'. Did you mean 'adapter'?"),
        (lambda s: s[2].update(experts=["stage:first/model"]), "stage 'merged': 'stage:first/model': stage 'first'"),
        (lambda s: s[3].update(models={"m": "stage:merged/adapter"}), "'merged' has no output 'adapter'. Known: model"),
        (lambda s: s[1].update(name="first"), "Two stages are called 'first'"),
        (lambda s: s[1].update(name="../x"), "needs a name of letters"),
        (lambda s: s[1].pop("name"), "needs a name of letters"),
        (lambda s: s[1].update(job="pipeline", stages=[]), "is a pipeline"),
        (lambda s: s[3].update(taks={}), "stage 'scores': unknown key 'taks'. Did you mean 'tasks'?"),
    ],
)
def test_a_wrong_pipeline_is_refused_before_anything_runs(tiny_model, rows, change, message):
    changed = stages(tiny_model, rows)
    change(changed)
    with pytest.raises(RecipeError) as caught:
        parse({"job": "pipeline", "stages": changed})
    assert message in str(caught.value)


def test_a_pipeline_that_was_stopped_before_it_wrote_its_recipe_goes_on(tiny_model, rows, tmp_path):
    recipe = parse({"job": "pipeline", "stages": stages(tiny_model, rows)[:1]})
    run = execute(recipe, tmp_path / "r", quiet=True)
    record = json.loads((run.folder / "record.json").read_text()) | {"status": "running"}
    (run.folder / "record.json").write_text(json.dumps(record))
    (run.folder / "recipe.yaml").unlink()
    assert execute(recipe, tmp_path / "r", quiet=True).done


def test_outputs_are_those_that_the_job_declares(tiny_model, rows, tmp_path):
    train = stages(tiny_model, rows)[0] | {"average": {"moving": {}, "snapshots": {"every": 1}}}
    train["trainer"]["max_steps"] = 2
    recipe = parse({key: value for key, value in train.items() if key != "name"})
    made = execute(recipe, tmp_path / "r", quiet=True).record["outputs"]
    assert list(registry.job["train"].facts.outputs(recipe)) == list(made)
    with pytest.raises(RecipeError, match="stage 'first' has no output 'model'"):  # of a run of another version, say
        resolve("stage:first/model", {"first": tmp_path / "r"})


def test_the_plan_tells_what_waits_for_what(tiny_model, rows):
    lines = plan(parse({"job": "pipeline", "stages": stages(tiny_model, rows)}))
    assert "merged: merge after first, second/adapter" in lines


def test_training_what_an_earlier_stage_makes_an_adapter_of_is_refused_before_anything_runs(tiny_model, rows):
    changed = stages(tiny_model, rows)
    for reference in ("stage:first", "stage:first/adapter"):
        changed[1]["model"] = reference
        with pytest.raises(UnsupportedError, match=rf"second: {reference} is an adapter, and train needs a whole"):
            plan(parse({"job": "pipeline", "stages": changed}))
    del changed[0]["adapter"]
    changed[1]["model"] = "stage:first"
    plan(parse({"job": "pipeline", "stages": changed}))


def test_a_run_names_the_stage_that_is_refused(tiny_model, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "say", "completion": "abc"}\n' * 4)
    recipe = {"job": "pipeline", "stages": stages(tiny_model, tmp_path / "rows.jsonl")[2:]}
    recipe["stages"][0] |= {"experts": [str(tiny_model), str(tmp_path / "nowhere")]}
    recipe["stages"][1]["models"] = {"merged": "stage:merged"}
    with pytest.raises(ModicumError, match="^stage 'merged': .*nowhere"):
        execute(parse(recipe), tmp_path / "run", quiet=True)
