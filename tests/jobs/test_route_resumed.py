"""The job route stopped and started again: the same bytes, and nothing done twice."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from jobs.support_route import WORDS, recipe, write_parts
from modicum.jobs import execute, plan
from modicum.models.routed import distilling
from modicum.recipe import parse


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def test_the_same_recipe_gives_the_same_bytes_and_goes_on_after_a_stop(parts, tmp_path, monkeypatch):
    given = parse(recipe(parts))
    execute(given, tmp_path / "one", quiet=True)
    from modicum.jobs import routing

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(routing, "fit", stop)
        with pytest.raises(KeyboardInterrupt):
            execute(given, tmp_path / "two", quiet=True)
    assert not (tmp_path / "two" / "model").exists()
    execute(given, tmp_path / "two", quiet=True)
    for path in sorted((tmp_path / "one" / "model").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "model" / path.name).read_bytes(), path.name


def test_sizes_are_fitted_in_as_many_bytes_and_a_stopped_run_goes_on(parts, tmp_path, monkeypatch):
    plain = parse(recipe(parts, rule={"name": "topk", "k": 2}, dense="base", router=None))
    given = parse(
        recipe(parts, rule={"name": "topk", "k": 2}, dense="base", router=None, distil={"steps": 4, "answer": 2})
    )
    assert any("distil: 4 steps of 4 prompts for each of 2 experts" in line for line in plan(given))
    execute(plain, tmp_path / "plain", quiet=True)
    run = execute(given, tmp_path / "one", quiet=True)
    errors = run.record["metrics"]["distilled"]
    assert list(errors) == list(WORDS) and all(e["after"] != e["before"] > 0 for e in errors.values())
    files = [tmp_path / name / "model" / "experts.safetensors" for name in ("plain", "one")]
    assert len({path.stat().st_size for path in files}) == 1
    before, after = map(load_file, files)
    for name, part in before.items():
        assert torch.equal(part, after[name]) != name.endswith(".alpha"), name

    done = []

    def once(*args, expert, **knobs):
        if done:
            raise KeyboardInterrupt
        done.append(expert)
        return fitted(*args, expert=expert, **knobs)

    fitted = distilling.distil_scales
    with monkeypatch.context() as patch:
        patch.setattr(distilling, "distil_scales", once)
        with pytest.raises(KeyboardInterrupt):
            execute(given, tmp_path / "two", quiet=True)
    assert not (tmp_path / "two" / "model").exists()
    done = []
    with monkeypatch.context() as patch:
        patch.setattr(distilling, "distil_scales", once)
        execute(given, tmp_path / "two", quiet=True)
    assert done == [1]  # the first expert is not fitted again
    for path in sorted((tmp_path / "one" / "model").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "model" / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_a_process_killed_anywhere_ends_with_the_same_bytes(parts, tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(parts, variants=["top1"], router={"gate": 0.9})))

    def start(folder):
        command = [sys.executable, "-m", "modicum", "run", str(file), "--out", str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finished(process):
        told, _ = process.communicate(timeout=600)
        assert process.returncode == 0, told[-2000:]

    finished(start(tmp_path / "whole"))
    killed = tmp_path / "killed"
    kills = 0
    for stage in ("record.json", ".building/*/*", ".building/*/dense", ".building/*/experts", ".model*", "model"):
        process = start(killed)
        while process.poll() is None and not list(killed.glob(stage)):
            time.sleep(0.001)
        if process.poll() is None:
            kills += 1
            process.send_signal(signal.SIGKILL)
        process.communicate()
    finished(start(killed))
    assert kills >= 3
    for path in sorted((tmp_path / "whole").rglob("*.*")):
        if path.parent.name in ("model", "top1"):
            other = killed / path.relative_to(tmp_path / "whole")
            assert path.read_bytes() == other.read_bytes(), path.name
    assert not list(killed.glob(".building")) and not list(killed.glob(".model*"))


def test_a_stop_while_what_was_built_is_removed_leaves_no_part_of_it_to_go_on_from(parts, tmp_path, monkeypatch):
    given = parse(recipe(parts, router=None))
    execute(given, tmp_path / "one", quiet=True)
    real = shutil.rmtree

    def half(path, *args, **options):
        if not list(Path(path).glob("**/dense/*.safetensors")):
            return real(path, *args, **options)
        next(Path(path).glob("**/dense/*.safetensors")).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(KeyboardInterrupt):
            execute(given, tmp_path / "two", quiet=True)
    execute(given, tmp_path / "two", quiet=True)
    assert not list((tmp_path / "two").glob(".*"))
    for path in sorted((tmp_path / "one" / "model").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / "model" / path.name).read_bytes(), path.name
