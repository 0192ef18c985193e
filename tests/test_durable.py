"""What is committed is on the disk before it has its name, and what lay there goes last."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from modicum import durable
from modicum.durable import commit, remove, restore, whole_file, whole_folder, write_atomic
from modicum.errors import CheckpointError
from modicum.lock import remove_leftovers


@pytest.fixture
def told(monkeypatch):
    """The calls that reach the disk, in their order: ``("sync", name)`` and ``("rename", name)``."""
    seen = []
    real = {"fsync": os.fsync, "rename": os.rename, "replace": os.replace, "exchange": durable._exchange}

    def sync(descriptor):
        seen.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        real["fsync"](descriptor)

    def moved(kind):
        def move(source, target, **_):
            seen.append(("rename", Path(target).name))
            return real[kind](source, target)

        return move

    def exchange(one, other):
        done = real["exchange"](one, other)
        seen.extend([("rename", Path(other).name)] * done)
        return done

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", moved("rename"))
    monkeypatch.setattr(os, "replace", moved("replace"))
    monkeypatch.setattr(durable, "_exchange", exchange)
    return seen


def fill(folder):
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_text("a")
    (folder / "inner" / "b").write_text("b")


@pytest.mark.parametrize("there", ["nothing", "empty", "full"])
def test_files_then_folders_then_the_name_then_the_folder_above(tmp_path, told, there):
    target = tmp_path / "model"
    if there != "nothing":
        target.mkdir()
    if there == "full":
        (target / "old").write_text("old")
    with whole_folder(target) as partial:
        fill(partial)
        told.clear()
    names = [f"{kind} {name}" for kind, name in told]
    order = ["sync b", "sync inner", "sync a", "sync .model.partial", "rename model", f"sync {tmp_path.name}"]
    positions = [names.index(step) for step in order if step != "sync a"]
    assert positions == sorted(positions)
    assert names.index("sync a") < names.index("sync .model.partial")
    assert {path.name for path in target.iterdir()} == {"a", "inner"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, told):
    write_atomic(tmp_path / "record.json", "{}")
    kinds = [kind for kind, _ in told]
    assert kinds == ["sync", "rename", "sync"] and told[-1] == ("sync", tmp_path.name)


def test_a_folder_that_cannot_take_the_place_in_one_step_moves_the_old_one_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    test = tmp_path / "model"
    test.mkdir()
    (test / "old").write_text("old")
    with whole_folder(test) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in test.iterdir()] == ["new"] and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_commit_moved_aside_comes_back(tmp_path, monkeypatch):
    target, partial = tmp_path / "model", tmp_path / ".model.partial"
    fill(target)
    fill(partial)
    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    real = Path.rename

    def dies(self, other):
        if self == partial:
            raise KeyboardInterrupt
        return real(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        with pytest.raises(KeyboardInterrupt):
            commit(partial, target)
    assert not target.exists()
    restore(target)
    assert (target / "inner" / "b").read_text() == "b"
    assert not (tmp_path / ".model.replaced").exists()


def test_what_is_not_finished_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    fill(target)

    def refuse():
        raise ValueError("changed")

    with pytest.raises(ValueError, match="changed"), whole_folder(target, check=refuse) as partial:
        (partial / "new").write_text("new")
    with pytest.raises(RuntimeError), whole_file(target / "a") as file:
        file.write_text("new")
        raise RuntimeError
    assert (target / "a").read_text() == "a"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "inner", "model"]


def test_disks_that_cannot_sync_a_folder_are_used_all_the_same(tmp_path, monkeypatch):
    def unable(_):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unable)
    write_atomic(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


FULL = [
    OSError(28, "No space left on device"),
    OSError(122, "Disk quota exceeded"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0: PytorchStreamWriter failed"),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: str(error)[:20])
def test_a_full_disk_is_told_in_one_line(tmp_path, monkeypatch, error):
    monkeypatch.setattr(durable, "_free", lambda _: 1_500_000)
    (tmp_path / "large").write_bytes(bytes(3_000_000))
    with pytest.raises(CheckpointError) as told, durable.full_disks_told(tmp_path):
        raise error
    assert str(told.value).startswith(
        f"The disk of {tmp_path} is full: 2 MB are free; the largest file of this run has 3 MB"
    )
    assert "Free some" in str(told.value) and "\n" not in str(told.value)


def test_other_errors_are_none_of_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(durable, "_free", lambda _: 10**12)
    for error in (ValueError("x"), RuntimeError("PytorchStreamWriter failed"), OSError(13, "Permission denied")):
        with pytest.raises(type(error)), durable.full_disks_told(tmp_path):
            raise error


@pytest.fixture
def dies(monkeypatch):
    """Let the removal of a folder end when one of its files is gone, as a kill does."""
    real = shutil.rmtree

    def half(path, *args, **options):
        files = [file for file in Path(path).rglob("*") if file.is_file()]
        if not files:
            return real(path, *args, **options)
        files[0].unlink()
        raise KeyboardInterrupt

    return lambda: monkeypatch.setattr(shutil, "rmtree", half)


def test_a_folder_that_is_removed_has_its_name_whole_or_not_at_all(tmp_path, dies, monkeypatch):
    folder = tmp_path / "run" / "work"
    fill(folder)
    dies()
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    assert not folder.exists()
    monkeypatch.undo()
    remove_leftovers(tmp_path / "run")
    assert not any((tmp_path / "run").iterdir())
    fill(folder)
    dies()
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    monkeypatch.undo()
    fill(folder)
    remove(folder)  # another of the same name takes along what the killed call left
    assert not any((tmp_path / "run").iterdir())


def test_what_lay_there_is_put_back_where_the_new_folder_cannot_have_its_name(tmp_path, monkeypatch):
    target, partial = tmp_path / "model", tmp_path / ".model.partial"
    fill(target)
    fill(partial)
    (target / "a").write_text("old")
    real = Path.rename

    def full(path, name):
        if path == partial:
            raise OSError(28, "no space left")
        return real(path, name)

    monkeypatch.setattr(durable, "_exchange", lambda *_: False)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space left"):
        commit(partial, target)
    assert (target / "a").read_text() == "old"
