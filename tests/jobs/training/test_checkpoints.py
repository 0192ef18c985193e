"""From which checkpoint a run goes on: names beside checkpoints, and checkpoints cut short."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from modicum.jobs.training.checkpoints import (
    MANIFEST,
    WRITER,
    checkpoints,
    last_checkpoint,
    read_manifest,
    rotate,
    set_aside,
    trouble,
    write_manifest,
)


def checkpoint(folder, name, *, sealed=True, **state):
    path = folder / name
    path.mkdir(parents=True)
    save_file({"w": torch.zeros(4)}, path / "model.safetensors")
    torch.save({"step": 1}, path / "optimizer.pt")
    (path / "rng").mkdir()
    (path / "rng" / "rng_state_0.txt").write_text("draws")
    state = {"global_step": 1} | ({"stateful_callbacks": {WRITER: {}}} if sealed else {}) | state
    (path / "trainer_state.json").write_text(json.dumps(state))
    if sealed:
        write_manifest(path, processes=1)
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
    assert last_checkpoint(folder).name == "checkpoint-10"
    assert len(list(folder.iterdir())) == 2 + len(names)


STRAY = ["checkpoint-10-backup", "checkpoint-", "checkpoint-best", "checkpoint-010", "checkpoint--3"]


@pytest.mark.parametrize("name", STRAY)
def test_a_stray_name_alone_is_no_checkpoint(tmp_path, name):
    checkpoint(tmp_path, name)
    assert last_checkpoint(tmp_path) is None and (tmp_path / name).is_dir()


def test_a_file_with_a_checkpoints_name_is_passed_over(tmp_path):
    checkpoint(tmp_path, "checkpoint-2")
    (tmp_path / "checkpoint-4").write_text("notes")
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
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
    "everything missing": lambda path: shutil.rmtree(path) or path.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("sealed", [True, False])
def test_the_newest_whole_checkpoint_is_taken_and_what_is_wrong_with_others_is_told(tmp_path, damage, sealed):
    checkpoint(tmp_path, "checkpoint-2")
    broken = checkpoint(tmp_path, "checkpoint-4", sealed=sealed)
    DAMAGES[damage](broken)
    told = []
    assert last_checkpoint(tmp_path, passed=lambda *what: told.append(what)).name == "checkpoint-2"
    assert [path for path, _ in told] == [broken] and broken.is_dir()


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    file.write_bytes(content)


@given(st.data())
@settings(max_examples=40)
def test_one_bit_of_any_file_is_noticed_and_named(tmp_path_factory, data):
    path = checkpoint(tmp_path_factory.mktemp("checkpoints"), "checkpoint-2")
    assert trouble(path) is None
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    assert {*read_manifest(path)["files"]} == {*names} - {MANIFEST}
    name = data.draw(st.sampled_from([name for name in names if name != MANIFEST]))
    file = path / name
    change = data.draw(st.sampled_from(["flip", "cut", "more", "zeros", "gone", "folder"]))
    if change == "flip":
        flip(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    elif change == "cut":
        os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    elif change == "more":
        file.write_bytes(file.read_bytes() + b"x")
    elif change == "zeros":
        file.write_bytes(bytes(file.stat().st_size))
    else:
        file.unlink()
        if change == "folder":
            file.mkdir()
    assert name in trouble(path)


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "{}", '{"files": {}}', '{"files": 3}', '{"files": {"a": 1}}'])
def test_a_damaged_manifest_is_named(tmp_path, text):
    path = checkpoint(tmp_path, "checkpoint-2")
    (path / MANIFEST).write_text(text)
    assert trouble(path) == f"{MANIFEST} is damaged"
    (path / MANIFEST).unlink()
    assert trouble(path) == f"{MANIFEST} is missing"  # the state says that one was going to follow


def test_a_checkpoint_of_an_earlier_version_is_whole_without_a_manifest(tmp_path):
    assert trouble(checkpoint(tmp_path, "checkpoint-2", sealed=False)) is None


@pytest.mark.parametrize("damage", [None, "weights cut", "everything missing"])
def test_a_checkpoint_is_of_no_use_without_the_best_one_where_that_is_wanted(tmp_path, damage):
    best = checkpoint(tmp_path, "checkpoint-2")
    checkpoint(tmp_path, "checkpoint-4", best_global_step=2)
    checkpoint(tmp_path, "checkpoint-6", best_global_step=6)
    assert last_checkpoint(tmp_path, best=True).name == "checkpoint-6"
    (tmp_path / "checkpoint-6" / "model.safetensors").unlink()
    if damage:
        DAMAGES[damage](best)
    told = []
    found = last_checkpoint(tmp_path, best=True, passed=lambda path, why: told.append(f"{path.name}: {why}"))
    assert (found and found.name) == (None if damage else "checkpoint-4")
    assert not damage or told[1].startswith("checkpoint-4: checkpoint-2, the best one by then, is not whole: ")
    assert last_checkpoint(tmp_path).name == "checkpoint-4"


def test_what_is_damaged_is_kept_aside_and_what_was_not_finished_is_deleted(tmp_path):
    for number in range(3):
        path = checkpoint(tmp_path, "checkpoint-4")
        cut("model.safetensors")(path)
        suffix = "" if number == 0 else f"-{number + 1}"
        said = set_aside(path, trouble(path))
        assert said.startswith("checkpoint-4 is not whole (model.safetensors has ")
        assert said.endswith(f"kept as checkpoint-4.aside{suffix}.")
        assert (tmp_path / f"checkpoint-4.aside{suffix}" / "optimizer.pt").exists() and not path.exists()
    assert checkpoints(tmp_path) == []
    path = checkpoint(tmp_path, "checkpoint-6", sealed=False)
    (path / "trainer_state.json").unlink()  # the Trainer writes it last
    assert "was not finished" in set_aside(path, trouble(path)) and not path.exists()


def test_the_target_of_a_link_stays_as_it_is(tmp_path):
    target = checkpoint(tmp_path / "elsewhere", "kept", sealed=False)
    (target / "trainer_state.json").unlink()
    (tmp_path / "run").mkdir()
    link = tmp_path / "run" / "checkpoint-4"
    link.symlink_to(target)
    set_aside(link, trouble(link))
    assert last_checkpoint(tmp_path / "run") is None and (target / "model.safetensors").exists()


def test_no_folder_is_no_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None


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
