"""What is written appears whole, and stays after a loss of power: the one order in which every result is committed.

First the bytes of each file reach the disk, then the names in its folder, then the folder is renamed, then the rename
itself reaches the disk. The record that calls a run done is written after all of that: a machine that loses power at
any moment never has a record without the bytes it speaks of. A folder that is replaced changes places with the new one
in one step where the file system can do that, and is removed afterwards.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path

from modicum.errors import CheckpointError, ModicumError

UNABLE = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # of file systems that have no such call
REMOVED = ".removed"  # how the name of a folder ends while it is removed
HERE, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNABLE:
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until every file below a folder is on the disk, and then every folder, the innermost first."""
    for place, _, files in os.walk(folder, topdown=False):
        for name in files:
            path = Path(place, name)
            if stat.S_ISREG(path.lstat().st_mode):
                sync(path)
        sync(Path(place))


def commit(partial: Path, target: Path) -> None:
    """Put a finished file or folder in its place, so that it is there whole after a loss of power.

    Args:
        partial: What was written, in the same folder as ``target``.
        target: Where it belongs. Whatever lies there is removed once the new one is in its place.

    Raises:
        OSError: It cannot be written. What lay there is as it was.
    """
    sync_tree(partial) if partial.is_dir() else sync(partial)
    replaced = _replaced(target)
    if not target.is_dir() or target.is_symlink() or not any(target.iterdir()):
        partial.replace(target)  # takes the place of a file, of a link and of an empty folder
    else:
        shutil.rmtree(replaced, ignore_errors=True)
        if _exchange(partial, target):
            partial.rename(replaced)
        else:
            target.rename(replaced)
            try:
                partial.rename(target)
            except OSError:
                restore(target)
                raise
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore(target: Path) -> None:
    """Put back what a killed :func:`commit` had moved aside, or remove what it had not removed yet."""
    replaced = _replaced(target)
    if replaced.is_dir() and not target.exists():
        with suppress(FileNotFoundError):  # another process of this launch was first
            replaced.rename(target)
    elif replaced.is_dir():
        shutil.rmtree(replaced, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove whatever lies there: a folder with all that is in it, a file, a link, or a pipe, which is not opened.

    A folder loses its name first: whoever finds it later, after a kill in between, must not take a part for the whole.
    """
    gone = path.with_name(f".{path.name}{REMOVED}")
    shutil.rmtree(gone, ignore_errors=True)  # what a killed call left
    if path.is_dir() and not path.is_symlink():
        with suppress(OSError):  # no name of that length, or a place where something is mounted
            path = path.rename(gone)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replaced(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; ``False`` where the system or its file system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def keep_aside(path: Path, place: Path, name: str) -> None:
    """Move what lies there to ``name`` in a folder, over nothing: into a numbered folder where that is taken."""
    places = chain([place], (place / str(number) for number in count(2)))
    target = next(each / name for each in places if not os.path.lexists(each / name))
    target.parent.mkdir(parents=True, exist_ok=True)
    path.replace(target)


def write_atomic(path: Path, text: str) -> None:
    """Write ``text`` so that a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Half a character, as JSON may escape it, is written as its escape, in which JSON reads it back.
        beside.write_text(text, encoding="utf-8", errors="backslashreplace")
        commit(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a file beside ``path`` to write; it becomes ``path`` when the block ends without an error."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield beside
        follow_umask(beside)
        commit(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path, *, keep_partial: bool = False, check: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """Give a folder beside ``path`` to write into; it becomes ``path`` when the block ends without an error.

    Args:
        path: The folder to appear; one that is there already is replaced.
        keep_partial: Leave the unfinished folder on an error, so that the next call resumes in it.
        check: Called before the folder appears; what it raises keeps it from appearing.
    """
    partial = path.with_name(f".{path.name}.partial")
    restore(path)
    if not keep_partial:
        remove(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        check()
        follow_umask(partial)
        commit(partial, path)
    except BaseException:
        if not keep_partial:
            shutil.rmtree(partial, ignore_errors=True)
        raise


FULL = re.compile(
    "no space left|os error 28|quota exceeded|PytorchStreamWriter failed|file write failed|iostream error"
    "|inline_container",
    re.IGNORECASE,
)
LITTLE = 256 << 20  # free bytes under which a write that failed in other words failed for want of space


@contextmanager
def full_disks_told(folder: Path) -> Iterator[None]:
    """Turn the many words in which libraries say that a disk is full into one line, with the folder and what is free.

    Raises:
        CheckpointError: The disk of ``folder`` is full.
    """
    try:
        yield
    except ModicumError:
        raise
    except Exception as error:
        known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        free = _free(folder)
        if not known and not (FULL.search(str(error)) and free < LITTLE):
            raise
        wanted = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
        need = f"; the largest file of this run has {max(wanted) / 1e6:.0f} MB" if wanted else ""
        raise CheckpointError(
            f"The disk of {folder} is full: {free / 1e6:.0f} MB are free{need}. Free some, and run the same command "
            "again to go on, or choose another --out."
        ) from None


def _free(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def follow_umask(path: Path) -> None:
    """Give a file, or all files and folders in a folder, the modes that the user's umask gives to new ones.

    Some libraries write through temporary files, which only their owner may read.
    """
    probe = (path if path.is_dir() else path.parent) / f".mode.{os.getpid()}"
    probe.touch()
    try:
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
    for item in (path, *path.rglob("*")) if path.is_dir() else (path,):
        if item.is_symlink():
            continue
        # A folder may be entered by whoever may read it.
        wanted = mode | (mode & 0o444) >> 2 if item.is_dir() else mode
        if stat.S_IMODE(item.stat().st_mode) & 0o777 != wanted:
            item.chmod(wanted)
