"""From which checkpoint a run goes on: names beside checkpoints, and checkpoints cut short."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modicum.jobs.training.checkpoints import checkpoints, last_checkpoint, rotate


def checkpoint(folder, name):
    path = folder / name
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(4)}, path / "model.safetensors")
    torch.save({"step": 1}, path / "optimizer.pt")
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    return path


@given(
    st.lists(
        st.from_regex(r"checkpoint-[-0-9a-z_.٣]{0,6}|checkpoint|[a-z0-9]{1,4}", fullmatch=True).filter(
            lambda name: not (name.removeprefix("checkpoint-").isdecimal() and name.startswith("checkpoint-"))
        ),
        max_size=4,
        unique=True,
    )
)
@settings(max_examples=25)
def test_names_that_are_no_checkpoints_are_passed_over_and_left_alone(tmp_path_factory, names):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name in ("checkpoint-2", "checkpoint-10", *names):
        checkpoint(folder, name)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-10"]
    assert last_checkpoint(folder, delete_broken=True).name == "checkpoint-10"
    assert len(list(folder.iterdir())) == 2 + len(names)


STRAY = ["checkpoint-10-backup", "checkpoint-", "checkpoint-best", "checkpoint-010", "checkpoint--3"]


@pytest.mark.parametrize("name", STRAY)
def test_a_stray_name_alone_is_no_checkpoint(tmp_path, name):
    checkpoint(tmp_path, name)
    assert last_checkpoint(tmp_path, delete_broken=True) is None and (tmp_path / name).is_dir()


def test_a_file_with_a_checkpoints_name_is_passed_over(tmp_path):
    checkpoint(tmp_path, "checkpoint-2")
    (tmp_path / "checkpoint-4").write_text("notes")
    assert last_checkpoint(tmp_path, delete_broken=True).name == "checkpoint-2"
    assert (tmp_path / "checkpoint-4").is_file()


def cut(name):
    def damage(path):
        file = path / name
        file.write_bytes(file.read_bytes()[:-1])

    return damage


DAMAGES = {
    "state cut": cut("trainer_state.json"),
    "state missing": lambda path: (path / "trainer_state.json").unlink(),
    "state not text": lambda path: (path / "trainer_state.json").write_bytes(b"\xff\xfe\x00"),
    "state of zeros": lambda path: (path / "trainer_state.json").write_bytes(bytes(64)),
    "state of another kind": lambda path: (path / "trainer_state.json").write_text("[]"),
    "weights cut": cut("model.safetensors"),
    "weights missing": lambda path: (path / "model.safetensors").unlink(),
    "weights empty": lambda path: (path / "model.safetensors").write_bytes(b""),
    "optimizer cut": lambda path: os.truncate(path / "optimizer.pt", 100),
    "everything missing": lambda path: [file.unlink() for file in path.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("delete", [True, False])
def test_the_newest_whole_checkpoint_is_taken(tmp_path, damage, delete):
    checkpoint(tmp_path, "checkpoint-2")
    DAMAGES[damage](checkpoint(tmp_path, "checkpoint-4"))
    assert last_checkpoint(tmp_path, delete_broken=delete).name == "checkpoint-2"
    assert (tmp_path / "checkpoint-4").exists() != delete


def test_a_broken_link_target_is_not_deleted(tmp_path):
    target = checkpoint(tmp_path / "elsewhere", "kept")
    (target / "trainer_state.json").unlink()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-4").symlink_to(target)
    assert last_checkpoint(tmp_path / "run", delete_broken=True) is None and (target / "model.safetensors").exists()


def test_no_folder_is_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "none", delete_broken=True) is None


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(2, None, [6, 8]), (1, None, [8]), (1, 2, [2, 8]), (3, 2, [2, 6, 8]), (9, None, [2, 4, 6, 8])],
)
def test_old_checkpoints_go_and_everything_else_stays(tmp_path, limit, best, left):
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8", *STRAY, "checkpoint-99-old"):
        checkpoint(tmp_path, name)
    rotate(tmp_path, limit, best=best and str(tmp_path / f"checkpoint-{best}"))
    assert [int(path.name.partition("-")[2]) for path in checkpoints(tmp_path)] == left
    assert len(list(tmp_path.iterdir())) == len(left) + len(STRAY) + 1
