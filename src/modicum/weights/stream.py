"""A fold over tensor names: make each tensor, put its bytes in place, forget it.

The result's files are laid out before the first tensor is made, so workers (threads here, ranks under ``torchrun``)
write theirs in any order and the bytes come out the same. What is finished is kept in a journal: a job that was killed
goes on where it was. The result is written beside its final name and renamed when it is whole. A lock beside both
keeps a second job out while the first works; a killed job's lock keeps nobody out.
"""

from __future__ import annotations

import errno
import json
import mmap
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modicum import processes
from modicum.durable import commit, remove, restore
from modicum.errors import CheckpointError, InputGoneError, ModicumError
from modicum.record import digest
from modicum.weights import company
from modicum.weights.files import Slot, Spec, lay_out, let_go, map_slot, plan_files, put
from modicum.weights.finished import Finished, Statistics, read_journals, to_disk
from modicum.weights.kernels.blocks import result_in

SHARD_BYTES = 5_000_000_000
ENDING = (signal.SIGINT, signal.SIGTERM)
MAPPED = hasattr(os, "posix_fallocate")  # results are written straight into the file's pages, see _prepare
T = TypeVar("T")
Made = tuple[Tensor | Mapping[str, Tensor], Statistics]


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_all(
    work: Callable[[str], T], names: Sequence[str], *, workers: int, fork: bool = False
) -> Iterator[tuple[str, T]]:
    """Yield each name with what ``work`` makes of it, in the order in which they are done; raise what fails at the end.

    Each worker computes with one of torch's own threads: whole tensors side by side use the cores better than one
    tensor at a time split over them, and the arithmetic is then the same however many cores there are.

    Args:
        work: Called on a worker.
        names: What to call it with, in this order.
        workers: How many at a time.
        fork: Workers are copies of this process and do not wait for each other's interpreter lock. For results that are
            small, as they are sent over. Where a fork is not safe, on other systems than Linux and in a process with
            threads of its own, workers are threads still.

    Raises:
        MemoryError: A worker process was killed.
    """
    # fork() copies the calling thread only; a lock held by another thread stays locked in the child for ever.
    if fork and workers > 1 and sys.platform == "linux" and threading.active_count() == 1:
        context = multiprocessing.get_context("fork")
        pool: Executor = ProcessPoolExecutor(workers, context, initializer=_begin_copy, initargs=(work,))
        task: Callable[[str], T] = _work_in_copy
    else:
        pool = ThreadPoolExecutor(workers, "modicum", initializer=partial(torch.set_num_threads, 1))
        task = work
    before = torch.get_num_threads()
    try:
        with _held_back() if isinstance(pool, ProcessPoolExecutor) else nullcontext():
            tasks = {pool.submit(task, name): name for name in names}
        for done in as_completed(tasks):
            if done.exception() is not None:
                break
            yield tasks.pop(done), done.result()
        if tasks:  # what else was done by then must not be lost
            pool.shutdown(wait=True, cancel_futures=True)
            for other, name in tasks.items():
                if not other.cancelled() and other.exception() is None:
                    yield name, other.result()
            done.result()
    except BrokenProcessPool:
        raise MemoryError(
            "A worker process was ended from outside, as when memory runs out. Free some, and run again to go on."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(before)


_copied: list[Callable[[str], Any]] = []  # what a forked worker does: it is inherited, as a closure cannot be sent


def _begin_copy(work: Callable[[str], Any]) -> None:
    _copied.append(work)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process is interrupted too, and ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as the pool does once another worker was killed: without a word
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    threading.Thread(target=_end_with_parent, daemon=True).start()


@contextmanager
def _held_back() -> Iterator[None]:
    """Let signals wait while workers are started, which would not know yet what to do about them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # it was killed: nobody is left to work for


def _work_in_copy(name: str) -> Any:
    return _copied[0](name)


def map_tensors(
    make: Callable[[str], Made],
    specs: Mapping[str, Spec],
    out: Path,
    *,
    identity: object,
    groups: Mapping[str, Sequence[str]] | None = None,
    companions: Mapping[str, bytes] | None = None,
    shard_bytes: int = SHARD_BYTES,
    stem: str = "model",
    workers: int | None = None,
    fork: bool = False,
    progress: bool = True,
    replace: bool = False,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Statistics]:
    """Write the checkpoint whose tensors ``make`` returns.

    Args:
        make: From a name to its tensor, of the shape and dtype announced, and what is worth recording about it.
        specs: What will be written.
        out: The folder to appear.
        identity: What the result depends on; an unfinished run of the same identity is continued.
        groups: Tensors that are made together, by the name that ``make`` is then called with, to return them by name.
        companions: Other files of the folder.
        shard_bytes: Largest file, unless one tensor alone is larger.
        stem: What the weight files are called.
        workers: One for each core when not given.
        fork: Workers are processes, not threads; see :func:`run_all`.
        progress: Show a bar when standard error is a terminal.
        replace: Take the place of what ``out`` holds, once the new one is whole; else that is refused.
        check: Called when all is made, and raises where an input changed meanwhile.

    Returns:
        The statistics of each tensor or group; nothing on the other processes than the first.

    Raises:
        CheckpointError: The result cannot be written, or another process writes it. Nothing of ours is left.
        RuntimeError: Of several processes that share the work, another one ended.
    """
    rank, world = processes.rank(), processes.world()
    layout = {name: (list(spec.shape), str(spec.dtype)) for name, spec in specs.items()}
    key = digest({"identity": identity, "layout": layout, "shard": shard_bytes})
    beside = out.with_name(f".{out.name}.partial")
    files = {beside / file: group for file, group in plan_files(specs, shard_bytes=shard_bytes, stem=stem).items()}

    members = {name: [name] for name in specs} if groups is None else groups
    sizes = {name: sum(specs[member].nbytes for member in group) for name, group in members.items()}

    def share() -> None:
        statistics = read_journals(beside)
        mine = sorted(sizes, key=lambda name: (-sizes[name], name))[rank::world]  # the largest first
        todo = [name for name in mine if name not in statistics]
        opened = _open_files(make, specs, files, groups)
        with opened as (work, descriptors), Finished(beside, rank, descriptors) as journal:
            done = run_all(work, todo, workers=workers or cores(), fork=fork)
            with _progress(sum(sizes[name] for name in todo), progress) as advance:
                for name, found in done:
                    journal.add(name, found, sizes[name])
                    advance(sizes[name])
        check()

    with _told(out, check):
        if rank != 0:
            whole = again = False
            while not whole:
                with company.following(out, beside, rank, again=again) as leader:
                    if leader is None:
                        break
                    again = True
                    if _read_key(beside) != key:
                        raise RuntimeError(f"The first process makes something else of {out}: were all told the same?")
                    share()
                    whole = company.wait_for_leader(out, beside, leader)
            return {}
        with company.leading(out), _nothing_left(beside):
            restore(out)
            if not replace:
                check_vacant(out)
            _prepare(beside, files, key)
            company.admit(out, beside)
            share()
            company.wait_for_followers(lambda: len(read_journals(beside)) == len(members), out, beside, world)
            measured = read_journals(beside)
            _finish(beside, out, files, companions or {})
    return {name: measured[name] for name in members}


def check_vacant(out: Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        CheckpointError: It does.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists already. Choose another folder, or delete it.")


def _prepare(beside: Path, files: Mapping[Path, Mapping[str, Spec]], key: str) -> None:
    if _read_key(beside) == key:
        return
    remove(beside)
    beside.mkdir(parents=True)
    need = sum(spec.nbytes for group in files.values() for spec in group.values())
    free = shutil.disk_usage(beside).free
    if need > free:
        raise OSError(errno.ENOSPC, f"needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    for path, group in files.items():
        header, _ = lay_out(path, group)
        size = len(header) + sum(spec.nbytes for spec in group.values())
        with path.open("wb") as file:
            file.write(header)
            if MAPPED:  # a disk that fills up would end a process that writes to a hole in a mapped file
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
            file.flush()
            to_disk(file.fileno())  # the journal speaks of tensors alone
    (beside / "key").write_text(key)


def _read_key(beside: Path) -> str | None:
    try:
        return (beside / "key").read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None


@contextmanager
def _open_files(
    make: Callable[[str], Made],
    specs: Mapping[str, Spec],
    files: Mapping[Path, Mapping[str, Spec]],
    groups: Mapping[str, Sequence[str]] | None,
) -> Iterator[tuple[Callable[[str], Statistics], list[int]]]:
    """Give a function that has a tensor made and puts its bytes in place, for any worker, and their descriptors."""
    slots: dict[str, Slot] = {}
    for path, group in files.items():
        slots.update(lay_out(path, group)[1])
    with ExitStack() as stack:
        descriptors = {path: stack.enter_context(path.open("r+b")).fileno() for path in files}
        maps = {path: mmap.mmap(descriptor, 0) for path, descriptor in descriptors.items()} if MAPPED else {}

        def place_of(name: str) -> Tensor | None:
            return map_slot(maps[slots[name].path], slots[name]) if maps else None

        def store(name: str, tensor: Tensor, place: Tensor | None) -> None:
            spec, slot = specs[name], slots[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise TypeError(f"{name}: made {tuple(tensor.shape)} {tensor.dtype}, announced {spec}")
            if place is None or tensor.data_ptr() != place.data_ptr() or not tensor.is_contiguous():
                put(descriptors[slot.path], slot, tensor)

        def work(name: str) -> Statistics:
            if groups is not None:
                parts, statistics = make(name)
                for member in groups[name]:
                    store(member, parts[member], None)  # type: ignore[index]
                return statistics
            place = place_of(name)
            with result_in(place):
                tensor, statistics = make(name)
            store(name, tensor, place)  # type: ignore[arg-type]
            if place is not None:
                let_go(maps[slots[name].path], slots[name])
            return statistics

        yield work, list(descriptors.values())


def _finish(beside: Path, out: Path, files: Mapping[Path, Mapping[str, Spec]], companions: Mapping[str, bytes]) -> None:
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for group in files.values() for spec in group.values())},
            "weight_map": {name: path.name for path, group in files.items() for name in group},
        }
        (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, content in companions.items():
        (beside / name).write_bytes(content)
    for path in [beside / "key", *beside.glob("journal.*.jsonl")]:
        path.unlink()
    company.leave(beside)
    commit(beside, out)


@contextmanager
def _told(out: Path, check: Callable[[], None]) -> Iterator[None]:
    """Turn the disk's errors, and those of inputs that became shorter, into one line."""
    try:
        yield
    except MemoryError:
        check()  # reading beyond the new end of a file ends the process that does it
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            detail = error.strerror if error.filename is None and "free" in str(error.strerror) else "no space is left"
            raise CheckpointError(
                f"The disk of {out} is full: {detail}. Free some, or choose another folder."
            ) from None
        if error.filename is not None and out.parent not in Path(os.fsdecode(error.filename)).parents:
            raise CheckpointError(f"Cannot use {error.filename}: {error.strerror or error}. Check the path.") from None
        raise CheckpointError(f"Cannot write {out}: {error.strerror or error}. Choose another folder.") from None


@contextmanager
def _nothing_left(beside: Path) -> Iterator[None]:
    """Leave nothing behind that the user must mend the input for; what is finished stays if the input may be back."""
    try:
        yield
    except InputGoneError:
        raise
    except (OSError, ModicumError):
        with suppress(OSError):
            remove(beside)
        raise


@contextmanager
def _progress(total: int, wanted: bool) -> Iterator[Callable[[int], None]]:
    if not wanted or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # Without a thread of its own, which a fork must not find.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)

        def advance(n: int) -> None:
            bar.advance(task, n)
            bar.refresh()

        yield advance


def names_by_size(specs: Mapping[str, Spec]) -> list[str]:
    """Return the names, largest first: the order of work that leaves no core waiting at the end."""
    return sorted(specs, key=lambda name: (-specs[name].nbytes, name))
