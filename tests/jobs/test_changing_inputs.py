"""Inputs that change while they are read: one line, nothing half-written, nothing finished lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from modicum.errors import CheckpointError, InputGoneError
from modicum.jobs import execute
from modicum.jobs import train as training
from modicum.recipe import parse
from modicum.weights import extract_lora, merge
from support import tiny_family

merging = sys.modules["modicum.weights.merge"]  # the package has a function of the module's name


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    root = tiny_family(tmp_path_factory.mktemp("models"))
    rows = ({"prompt": f"say {i}", "completion": "a"} for i in range(8))
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.fixture
def models(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "models")


def overwrite(path):
    """Write other numbers into the same file."""
    other = {name: -tensor.clone() for name, tensor in load_file(path).items()}
    save_file(other, path.with_name("other"), {"format": "pt"})
    path.write_bytes(path.with_name("other").read_bytes())


def replace(path):
    """Put a file of other numbers in its place, as a download does."""
    other = {name: -tensor.clone() for name, tensor in load_file(path).items()}
    save_file(other, path.with_name("other"), {"format": "pt"})
    path.with_name("other").replace(path)


def remove(path):
    path.rename(path.with_name("gone"))


def touch(path):
    os.utime(path, (1, 1))


def after(monkeypatch, count, act, path):
    """Let ``act`` happen once so many tensors are made."""
    real, seen = merging.run_step, []

    def watched(step, **found):
        if len(seen) == count:
            act(path)
        seen.append(step.name)
        return real(step, **found)

    monkeypatch.setattr(merging, "run_step", watched)
    return seen


def run(models, out, **settings):
    experts = [models / "one", models / "two"]
    return merge(models / "base", experts, out, method="task_arithmetic", workers=1, progress=False, **settings)


@pytest.mark.parametrize("model", ["base", "two"])
def test_a_model_that_is_written_over_is_named_and_nothing_is_left(models, tmp_path, monkeypatch, model):
    after(monkeypatch, 5, overwrite, models / model / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{model}/model.safetensors changed while it was read"):
        run(models, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["models"]


@pytest.mark.parametrize("act", [replace, remove, touch])
def test_what_the_system_keeps_for_its_readers_is_read_to_the_end(models, tmp_path, monkeypatch, act):
    run(models, tmp_path / "clean")
    after(monkeypatch, 5, act, models / "two" / "model.safetensors")
    run(models, tmp_path / "out")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("clean", "out")]
    assert files[0] == files[1]


@pytest.mark.parametrize("act", [overwrite, replace])
def test_a_model_that_changes_between_its_header_and_its_numbers_is_named(models, tmp_path, monkeypatch, act):
    after(monkeypatch, 0, act, models / "two" / "model.safetensors")
    with pytest.raises(CheckpointError, match="two/model.safetensors changed while it was read"):
        run(models, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()


def test_a_model_that_is_gone_costs_nothing_that_is_finished(models, tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        after(patch, 5, stop, None)
        with pytest.raises(KeyboardInterrupt):
            run(models, tmp_path / "out")
    lost = models / "two" / "model.safetensors"
    with monkeypatch.context() as patch:
        after(patch, 0, remove, lost)
        with pytest.raises(InputGoneError, match="Cannot read .*two/model.safetensors any more"):
            run(models, tmp_path / "out")
    lost.with_name("gone").rename(lost)
    seen = after(monkeypatch, -1, None, None)
    run(models, tmp_path / "out")
    run(models, tmp_path / "clean")
    total = len(load_file(tmp_path / "clean" / "model.safetensors"))
    assert len(seen) == total - 5 + total
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("clean", "out")]
    assert files[0] == files[1]


def test_an_extraction_watches_its_models(models, tmp_path, monkeypatch):
    extract = sys.modules["modicum.weights.extract"]
    real = extract.write_adapter

    def late(*args, **settings):
        overwrite(models / "one" / "model.safetensors")
        return real(*args, **settings)

    monkeypatch.setattr(extract, "write_adapter", late)
    with pytest.raises(CheckpointError, match="one/model.safetensors changed while it was read"):
        extract_lora(models / "one", models / "base", tmp_path / "out", max_rank=2, progress=False)
    assert not (tmp_path / "out").exists()


TRUNCATED = """
import os, sys
from modicum.weights import merge  # noqa
merging = sys.modules["modicum.weights.merge"]
real, path = merging.run_step, sys.argv[1]
def truncating(step, **found):
    os.truncate(path, 4096)
    return real(step, **found)
merging.run_step = truncating
if sys.argv[2] == "one":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.argv = ["modicum", *sys.argv[3:]]
from modicum.cli import main
main()
"""


@pytest.mark.parametrize("workers", ["one", "forked"])
def test_a_model_that_becomes_shorter_ends_the_command_with_one_line(models, tmp_path, workers):
    recipe = {"job": "merge", "base": str(models / "base"), "method": "task_arithmetic",
              "experts": [str(models / "one"), str(models / "two")]}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    path = models / "two" / "model.safetensors"
    whole = path.read_bytes()
    command = ["run", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATED, str(path), workers, *command], capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1 and str(path) in done.stderr and "while it was read" in done.stderr
    assert not (tmp_path / "run" / "model").exists()
    path.write_bytes(whole)
    execute(parse(recipe), tmp_path / "run", quiet=True)
    execute(parse(recipe), tmp_path / "clean", quiet=True)
    files = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("clean", "run")]
    assert files[0] == files[1]


def train(models):
    return {"job": "train", "model": str(models / "base"), "adapter": {"rank": 2},
            "data": {"path": str(models / "rows.jsonl"), "max_length": 32},
            "trainer": {"max_steps": 2, "per_device_train_batch_size": 2, "save_steps": 1}}  # fmt: skip


@pytest.mark.parametrize(("name", "moment"), [("rows.jsonl", "_model"), ("base/model.safetensors", "_save")])
def test_a_training_sees_its_data_and_model_change(models, tmp_path, monkeypatch, name, moment):
    real = getattr(training, moment)

    def late(*args):
        path = models / name
        overwrite(path) if path.suffix == ".safetensors" else path.write_text(path.read_text().replace("say", "ask"))
        return real(*args)

    monkeypatch.setattr(training, moment, late)
    with pytest.raises(CheckpointError, match=f"{Path(name).name} changed while it was read"):
        execute(parse(train(models)), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "adapter").exists()
    assert (tmp_path / "run" / "checkpoints").exists() == (moment == "_save")  # nothing finished is lost


def test_data_that_changes_after_it_was_read_matters_to_nobody(models, tmp_path, monkeypatch):
    real = training._save

    def late(*args):
        (models / "rows.jsonl").write_text("")
        return real(*args)

    monkeypatch.setattr(training, "_save", late)
    assert execute(parse(train(models)), tmp_path / "run", quiet=True).done


def test_one_helper_writes_into_the_file_and_one_replaces_it(models):
    inode = (models / "one" / "model.safetensors").stat().st_ino
    overwrite(models / "one" / "model.safetensors")
    assert (models / "one" / "model.safetensors").stat().st_ino == inode
    replace(models / "one" / "model.safetensors")
    assert (models / "one" / "model.safetensors").stat().st_ino != inode
