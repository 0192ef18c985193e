"""What is done is whole: outputs are compared with the record before a run is skipped, and replaced only when made."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from modicum import durable
from modicum.errors import CheckpointError, ModicumError
from modicum.jobs import execute
from modicum.recipe import parse
from modicum.record import ASIDE, read_record
from modicum.stored import damage, verify
from support import tiny_family


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tiny_family(tmp_path_factory.mktemp("models"))
    rows = ({"prompt": f"say {i}", "completion": "a"} for i in range(4))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


def merge(models, **changes):
    return {"job": "merge", "base": str(models / "base"), "method": "task_arithmetic",
            "experts": [str(models / "one"), str(models / "two")], **changes}  # fmt: skip


def evaluate(models, **changes):
    task = {"kind": "exact_match", "data": {"path": str(models / "rows.jsonl")}, "max_new_tokens": 2}
    return {"job": "evaluate", "models": {"m": str(models / "one")}, "tasks": {"say": task}} | changes


def pipeline(models, *stages, **changes):
    return {"job": "pipeline", "stages": list(stages or [{"name": "merged", **merge(models, **changes)}])}


RECIPES = {"merge": merge, "evaluate": evaluate, "pipeline": pipeline}
DAMAGE = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one byte": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a folder": lambda path: (path.unlink(), path.mkdir(), (path / "mine").write_text("mine")),
    "a link to nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


def what(path):
    """Return what lies there, of whatever kind."""
    if path.is_symlink() or not path.exists():
        return path.readlink() if path.is_symlink() else None
    return [file.name for file in path.iterdir()] if path.is_dir() else path.read_bytes()


def contents(folder):
    kinds = (".safetensors", ".json", ".jsonl")
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix in kinds]
    own = ("record.json", "log.jsonl")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name not in own and ASIDE not in f.parts}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("job", RECIPES)
def test_a_damaged_output_is_made_again(models, tmp_path, job, how):
    recipe = parse(RECIPES[job](models))
    run = tmp_path / "run"
    execute(recipe, run, quiet=True)
    before = contents(run)
    damaged = {"merge": "model/model.safetensors", "evaluate": "items/m.say.jsonl"}.get(job)
    path = run / (damaged or "stages/merged/model/model.safetensors")
    DAMAGE[how](path)
    assert set(damage(run)) == {str(path.relative_to(run))} == set(verify(run).damaged)
    kept = what(path)
    execute(recipe, run, quiet=True)
    assert contents(run) == before and not damage(run)
    # What was there may be somebody's work.
    owner = run if damaged else run / "stages/merged"
    aside = owner / ASIDE / path.relative_to(owner)
    assert what(aside) == kept
    assert any("made again" in note for note in read_record(owner)["notes"])


def test_a_sound_run_is_not_touched(models, tmp_path):
    for name, make in RECIPES.items():
        execute(parse(make(models)), tmp_path / name, quiet=True)
        stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")}
        assert execute(parse(make(models)), tmp_path / name, quiet=True).done
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / name).rglob("*")} == stamps


def test_verify_reads_everything_on_the_command_line(models, tmp_path):
    execute(parse(pipeline(models)), tmp_path / "run", quiet=True)

    def asked(*folders):
        command = [sys.executable, "-m", "modicum", "verify", *map(str, folders)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    status, told = asked(tmp_path / "run")
    assert status == 0 and "files" in told and "MB, all as the record says" in told
    path = tmp_path / "run/stages/merged/model/model.safetensors"
    DAMAGE["one byte"](path)
    status, told = asked(tmp_path / "run")
    assert status == 2 and "model.safetensors changed. Run its recipe again" in told and len(told.splitlines()) == 1
    assert asked(tmp_path)[0] == 2


def test_an_input_that_is_gone_takes_nothing_along(models, tmp_path):
    one = tmp_path / "expert"
    one.symlink_to(models / "one")
    recipe = merge(models, experts=[str(one), str(models / "two")])
    execute(parse(recipe), tmp_path / "run", quiet=True)
    execute(parse(pipeline(models, experts=recipe["experts"])), tmp_path / "pipe", quiet=True)
    before = contents(tmp_path / "run"), contents(tmp_path / "pipe")
    one.unlink()
    for make, folder in ((recipe, "run"), (pipeline(models, experts=recipe["experts"]), "pipe")):
        with pytest.raises(ModicumError):
            execute(parse(make), tmp_path / folder, quiet=True)
    assert (contents(tmp_path / "run"), contents(tmp_path / "pipe")) == before
    one.symlink_to(models / "one")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert execute(parse(recipe), tmp_path / "run", quiet=True).done
    execute(parse(pipeline(models, experts=recipe["experts"])), tmp_path / "pipe", quiet=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == stamps


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_a_changed_stage_replaces_the_finished_one_only_when_it_is_done(models, tmp_path, how, monkeypatch):
    folder = tmp_path / "run"
    execute(parse(pipeline(models)), folder, quiet=True)
    before = contents(folder / "stages/merged")
    changed = pipeline(models, method={"name": "task_arithmetic", "scale": 0.3})
    if how == "refused":
        broken = pipeline(models, experts=[str(tmp_path / "nothing")])
        with pytest.raises(ModicumError):
            execute(parse(broken), folder, quiet=True)
    else:
        from modicum.weights import stream

        def dies(*_):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(stream, "_finish", dies)
            with pytest.raises(KeyboardInterrupt):
                execute(parse(changed), folder, quiet=True)
    assert contents(folder / "stages/merged") == before
    assert not damage(folder / "stages/merged")
    execute(parse(changed), folder, quiet=True)
    execute(parse(changed), tmp_path / "clean", quiet=True)
    assert contents(folder / "stages/merged/model") == contents(tmp_path / "clean/stages/merged/model")
    assert [path.name for path in (folder / "stages").iterdir()] == ["merged"]


def test_a_stage_that_was_done_but_not_in_its_place_is_not_made_twice(models, tmp_path, monkeypatch):
    from modicum import jobs

    folder = tmp_path / "run"
    execute(parse(pipeline(models)), folder, quiet=True)
    changed = pipeline(models, method={"name": "task_arithmetic", "scale": 0.3})

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "commit", dies)
        with pytest.raises(KeyboardInterrupt):
            execute(parse(changed), folder, quiet=True)
    made = folder / "stages/.merged.next/model/model.safetensors"
    stamp = made.stat().st_mtime_ns
    execute(parse(changed), folder, quiet=True)
    assert (folder / "stages/merged/model/model.safetensors").stat().st_mtime_ns == stamp
    assert read_record(folder)["status"] == "done" and not damage(folder)


@pytest.mark.parametrize("there", ["merge", "evaluate", "other pipeline"])
def test_a_pipeline_overwrites_no_run_of_another_recipe(models, tmp_path, there):
    other = pipeline(models, {"name": "other", **merge(models)}) if "pipeline" in there else RECIPES[there](models)
    execute(parse(other), tmp_path / "run", quiet=True)
    before = contents(tmp_path / "run"), (tmp_path / "run/record.json").read_bytes()
    with pytest.raises(CheckpointError, match="holds the run of another recipe"):
        execute(parse(pipeline(models)), tmp_path / "run", quiet=True)
    assert (contents(tmp_path / "run"), (tmp_path / "run/record.json").read_bytes()) == before


def test_a_killed_merge_that_replaces_another_leaves_it(models, tmp_path):
    """Its record was lost after the result was there: the second try must not remove the first one's result."""
    recipe = merge(models)
    run = tmp_path / "run"
    execute(parse(recipe), run, quiet=True)
    before = contents(run)
    record = json.loads((run / "record.json").read_text())
    (run / "record.json").write_text(json.dumps(record | {"status": "running"}))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "modicum", "run", str(tmp_path / "recipe.yaml"), "--out", str(run)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
    while not (run / ".model.partial").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert contents(run / "model") == {k.removeprefix("model/"): v for k, v in before.items() if k.startswith("model/")}
    execute(parse(recipe), run, quiet=True)
    assert contents(run) == before


@pytest.mark.parametrize("step", ["aside", "in place", "removed"])
def test_a_stage_that_a_kill_left_between_two_runs_of_its_place_is_put_right(models, tmp_path, monkeypatch, step):
    """The old run and the new one change places in two steps here, as where the system cannot do it in one."""
    old, new = (parse(merge(models, seed=seed)) for seed in (0, 1))
    execute(old, tmp_path / "stage", quiet=True)
    real = {"rename": Path.rename, "rmtree": shutil.rmtree}

    def renamed(path, target):
        if step == "aside" and Path(target) == tmp_path / "stage":
            raise KeyboardInterrupt
        return real["rename"](path, target)

    def rmtree(path, *args, **options):
        if Path(path).name == ".stage.replaced" and Path(path).exists():
            if step == "removed":
                (Path(path) / "record.json").unlink()
            raise KeyboardInterrupt
        return real["rmtree"](path, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "_exchange", lambda *_: False)
        patch.setattr(Path, "rename", renamed)
        patch.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            execute(new, tmp_path / "stage", quiet=True, on_change="replace")
    (tmp_path / ".stage.replaced" / ".lock").unlink(missing_ok=True)  # of the process that was killed
    monkeypatch.setattr(sys.modules["modicum.weights.merge"], "map_tensors", None)  # the new run was done already
    assert execute(new, tmp_path / "stage", quiet=True, on_change="replace").done
    assert [path.name for path in tmp_path.iterdir()] == ["stage"] and not verify(tmp_path / "stage").damaged
