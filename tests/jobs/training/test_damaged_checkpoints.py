"""A run goes on from its newest whole checkpoint, whatever happened to the others, and ends with the same bytes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from modicum.errors import CheckpointError, RecipeError
from modicum.jobs import execute, plan
from modicum.jobs.training import checkpoints
from modicum.jobs.training.checkpoints import MANIFEST, WRITER, read_manifest, set_aside, write_manifest
from modicum.recipe import parse
from modicum.record import read_record

BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
BEST |= {"metric_for_best_model": "loss", "greater_is_better": True}  # the first evaluation is the best


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "completion": "abc"}) + "\n" for n in range(8)))
    return path


def recipe(model, rows, /, trainer=None, **changes):
    steps = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_steps": 2}
    steps |= {"save_total_limit": 9, "logging_steps": 1}
    data = {"path": str(rows), "max_length": 64}
    settings = {"job": "train", "model": str(model), "data": data, "adapter": {"rank": 2, "init": "pissa"}}
    if "eval_strategy" in (trainer or {}):
        settings["eval_data"] = data | {"size": 3}
    return parse(settings | {"trainer": steps | (trainer or {})} | changes)


@pytest.fixture(scope="module")
def whole(tiny_model, rows, tmp_path_factory):
    return execute(recipe(tiny_model, rows), tmp_path_factory.mktemp("whole") / "r", quiet=True).folder


def killed(whole, folder):
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "adapter")
    (folder / "record.json").write_text(json.dumps(read_record(folder) | {"status": "running", "outputs": {}}))
    return folder / "checkpoints"


def weights(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_same(folder, whole):
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def spoil(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


FILES = ["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
FILES += ["parts-0.state", MANIFEST]


@pytest.mark.parametrize("how", [spoil, lambda file: file.write_bytes(b""), lambda file: file.unlink()])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_costs_the_steps_of_its_checkpoint_and_is_kept(tiny_model, rows, whole, tmp_path, name, how):
    saved = killed(whole, tmp_path / "r")
    how(saved / "checkpoint-6" / name)
    kept = {file.name: file.read_bytes() for file in (saved / "checkpoint-6").iterdir()}
    run = execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert_same(run.folder, whole)
    [note] = [note for note in run.record["notes"] if note.startswith("checkpoint-6 is not whole")]
    assert name in note and note.endswith("it is not used, and kept as checkpoint-6.aside.")
    assert {file.name: file.read_bytes() for file in (saved / "checkpoint-6.aside").iterdir()} == kept
    assert run.record["metrics"] == read_record(whole)["metrics"]


def test_with_every_checkpoint_damaged_the_run_starts_anew(tiny_model, rows, whole, tmp_path):
    saved = killed(whole, tmp_path / "r")
    for path in list(saved.iterdir()):
        spoil(path / "optimizer.pt")
    run = execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert_same(run.folder, whole)
    assert len([note for note in run.record["notes"] if "not whole" in note]) == 3
    assert len((run.folder / "log.jsonl").read_text().splitlines()) == 6


def test_a_damaged_start_of_the_adapter_is_made_anew(tiny_model, rows, whole, tmp_path):
    saved = killed(whole, tmp_path / "r")
    shutil.rmtree(saved / "checkpoint-6")
    spoil(tmp_path / "r" / "adapter_start.safetensors")
    run = execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert_same(run.folder, whole)
    assert any("adapter_start.safetensors is damaged" in note for note in run.record["notes"])


def test_another_start_than_the_checkpoints_is_refused(tiny_model, rows, whole, tmp_path):
    killed(whole, tmp_path / "r")
    wanted = recipe(tiny_model, rows, adapter={"rank": 2, "init": "gaussian"})
    other = execute(wanted, tmp_path / "other", quiet=True)
    shutil.copy(other.folder / "adapter_start.safetensors", tmp_path / "r")
    with pytest.raises(CheckpointError, match="is not the one that the checkpoint was trained from"):
        execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)


def test_the_best_weights_are_found_again_in_a_folder_that_was_moved(tiny_model, rows, tmp_path):
    wanted = recipe(tiny_model, rows, trainer=BEST)
    first = execute(wanted, tmp_path / "first", quiet=True).folder
    saved = killed(first, tmp_path / "moved")
    state = json.loads((saved / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2
    first.rename(tmp_path / "gone")
    assert_same(execute(wanted, tmp_path / "moved", quiet=True).folder, tmp_path / "gone")


def test_a_damaged_best_checkpoint_is_made_anew(tiny_model, rows, tmp_path):
    wanted = recipe(tiny_model, rows, trainer=BEST)
    first = execute(wanted, tmp_path / "first", quiet=True).folder
    saved = killed(first, tmp_path / "r")
    spoil(saved / "checkpoint-2" / "adapter_model.safetensors")
    assert_same(execute(wanted, tmp_path / "r", quiet=True).folder, first)
    assert sorted(path.name for path in saved.glob("*.aside")) == [f"checkpoint-{n}.aside" for n in (2, 4, 6)]


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(tiny_model, rows, whole, tmp_path):
    saved = killed(whole, tmp_path / "r")
    for path in saved.iterdir():
        state = json.loads((path / "trainer_state.json").read_text())
        del state["stateful_callbacks"][WRITER]
        (path / "trainer_state.json").write_text(json.dumps(state))
        (path / MANIFEST).unlink()
        (path / "parts-0.state").unlink()
    shutil.rmtree(saved / "checkpoint-6")
    run = execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert_same(run.folder, whole)
    assert any("of an earlier version: train_loss" in note for note in run.record["notes"])
    assert read_manifest(saved / "checkpoint-6")["files"]


def test_another_number_of_processes_is_refused(tiny_model, rows, whole, tmp_path):
    saved = killed(whole, tmp_path / "r")
    write_manifest(saved / "checkpoint-6", processes=2)
    with pytest.raises(CheckpointError, match=r"saved by 2 processes, and 1 would go on .* Start 2, or choose another"):
        execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "apollo_adamw_layerwise", "adalomo"])
def test_an_optimizer_whose_state_no_checkpoint_holds_is_refused(tiny_model, rows, name):
    with pytest.raises(RecipeError, match=f"trainer.optim: {name} keeps its state where no checkpoint holds it"):
        plan(recipe(tiny_model, rows, trainer={"optim": name}))


@pytest.mark.parametrize("key", ["save_only_model", "ignore_data_skip"])
def test_arguments_that_a_run_cannot_go_on_with_exactly_are_refused_before_it_begins(tiny_model, rows, tmp_path, key):
    wanted = recipe(tiny_model, rows, trainer={key: True})
    with pytest.raises(RecipeError, match=f"trainer.{key}: .* Leave it out"):
        plan(wanted)
    with pytest.raises(RecipeError, match=f"trainer.{key}"):
        execute(wanted, tmp_path / "r", quiet=True)
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_that_was_still_being_written_is_deleted_however_far_it_was(tiny_model, rows, whole, tmp_path):
    """What takes long after the Trainer's own files is to wait for the disk: most kills come then."""

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "sync_tree", stop)
        execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    saved = tmp_path / "r" / "checkpoints"
    assert (saved / "checkpoint-2" / "trainer_state.json").exists()
    run = execute(recipe(tiny_model, rows), tmp_path / "r", quiet=True)
    assert_same(run.folder, whole)
    assert [path.name for path in sorted(saved.iterdir())] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert any("was not finished" in note for note in run.record["notes"])


def test_a_checkpoint_whose_manifest_was_being_written_is_deleted(tmp_path):
    path = tmp_path / "checkpoint-2"
    path.mkdir()
    (path / "trainer_state.json").write_text('{"global_step": 2}')
    (path / ".manifest.json.123").write_text("{")
    assert "is deleted" in set_aside(path, "why") and list(tmp_path.iterdir()) == []
