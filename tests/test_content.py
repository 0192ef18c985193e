"""Hashes see every byte, and remember only files that have been at rest."""

from __future__ import annotations

import os
import socket
import time

import pytest
import xxhash

from modicum import content
from modicum.content import BLOCK, Stamp, files_in, fingerprint, hash_file, hash_files, unchanged
from modicum.errors import CheckpointError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def big(tmp_path):
    path = tmp_path / "big.bin"
    path.write_bytes(os.urandom(3 * BLOCK + 17))
    return path


def at_rest(path, seconds=60):
    """As if its content had been changed a while ago."""
    before = time.time() - seconds
    os.utime(path, (before, before))


@pytest.fixture
def later(monkeypatch):
    real = time.time
    monkeypatch.setattr(content.time, "time", lambda: real() + 10)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
def test_a_hash_is_that_of_all_bytes(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    assert hash_file(tmp_path / "a") == xxhash.xxh3_128_hexdigest(data) == fingerprint(tmp_path / "a")


@pytest.mark.parametrize("position", [0, BLOCK, 2 * BLOCK + 5, -1])
def test_one_byte_anywhere_makes_another_hash(big, later, position):
    before = hash_file(big)
    stamp = big.stat()
    data = bytearray(big.read_bytes())
    data[position] ^= 1
    big.write_bytes(data)
    os.utime(big, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as tools do that keep times
    assert hash_file(big) != before


def test_a_file_at_rest_is_read_once(big, later, monkeypatch, cache):
    before = hash_file(big)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(content, "_read", lambda _: pytest.fail("read again"))
        assert hash_file(big) == before
        with pytest.raises(pytest.fail.Exception):
            hash_file(big, cached=False)


def test_a_file_that_changed_just_now_is_not_remembered(big, cache):
    hash_file(big)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"\0" * 32, b"short"])
def test_a_damaged_memory_is_not_believed(big, later, cache, damage):
    before = hash_file(big)
    (note,) = cache.iterdir()
    note.write_bytes(damage)
    assert hash_file(big) == before


def test_no_cache_no_harm(big, later, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MODICUM_CACHE", str(tmp_path / "file"))
    assert hash_file(big) == xxhash.xxh3_128_hexdigest(big.read_bytes())


def test_the_memory_is_bounded(big, later, monkeypatch, cache, tmp_path):
    monkeypatch.setattr(content, "KEPT", 3)
    cache.mkdir(parents=True)
    for i in range(9):
        (cache / f"old{i}").write_text("x" * 32)
    content._forget(cache)
    assert len(list(cache.iterdir())) == 3


def test_several_files_are_hashed_as_one_by_one(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}").write_bytes(os.urandom(BLOCK + i + 1))
    paths = files_in(tmp_path)
    assert hash_files(paths) == {path: hash_file(path) for path in paths}


def test_a_folder_is_its_names_and_contents(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "a").write_text("1")
        (tmp_path / name / "b").write_text("2")
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "y")
    (tmp_path / "y" / "b").rename(tmp_path / "y" / "c")
    assert fingerprint(tmp_path / "x") != fingerprint(tmp_path / "y")


@pytest.mark.parametrize("name", ["my.partial", ".x.partial", "a.partial.b", ".lock"])
def test_a_path_with_a_strange_name_is_hashed_as_any_other(tmp_path, name):
    (tmp_path / name).mkdir()
    empty = fingerprint(tmp_path / name)
    (tmp_path / name / "a").write_text("1")
    one = fingerprint(tmp_path / name)
    (tmp_path / name / "a").write_text("2")
    assert len({empty, one, fingerprint(tmp_path / name)}) == 3
    (tmp_path / "file.partial").write_text("1")
    assert fingerprint(tmp_path / "file.partial") == xxhash.xxh3_128_hexdigest(b"1")


def test_what_a_killed_process_left_in_a_folder_is_no_part_of_it(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a").write_text("1")
    before = fingerprint(tmp_path / "d")
    (tmp_path / "d" / ".model.partial").mkdir()
    (tmp_path / "d" / ".model.partial" / "x").write_text("1")
    (tmp_path / "d" / ".lock").write_text("1")
    assert fingerprint(tmp_path / "d") == before
    (tmp_path / "d" / "model.partial").write_text("1")
    assert fingerprint(tmp_path / "d") != before


def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe is a pipe, expected a file"):
        fingerprint(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)
        server.bind("socket")
        with pytest.raises(CheckpointError, match="is a socket"):
            fingerprint(tmp_path / "socket")
    with pytest.raises(CheckpointError, match="a device"):
        fingerprint("/dev/zero")
    with pytest.raises(CheckpointError, match="No such file"):
        fingerprint(tmp_path / "none")


def test_a_file_that_grows_while_it_is_read_is_named(big, monkeypatch):
    real = content._read

    def slow(path):
        found = real(path)
        with path.open("ab") as file:
            file.write(b"more")
        return found

    monkeypatch.setattr(content, "_read", slow)
    with pytest.raises(CheckpointError, match="big.bin changed while it was read"):
        hash_file(big)


@pytest.mark.parametrize("change", ["content", "touched", "replaced", "removed"])
def test_changes_after_reading_are_seen(big, tmp_path, change):
    stamps = [(big, Stamp.of(big))]
    unchanged(stamps)
    if change == "content":
        with big.open("r+b") as file:
            file.write(b"x")
    elif change == "touched":
        at_rest(big)
    elif change == "replaced":
        (tmp_path / "other").write_bytes(big.read_bytes())
        (tmp_path / "other").replace(big)
    else:
        big.unlink()
    with pytest.raises(CheckpointError, match="big.bin changed while it was read"):
        unchanged(stamps)
