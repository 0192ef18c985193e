"""Several processes at one result: the first of a launch leads and holds its lock, the others follow it.

They meet through the folder that they share and need no process group. Whoever waits gives up when the process that it
waits for has died.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from modicum import lock

LEADER = "leader"  # a file of the unfinished folder: who leads there, once it is ready for others


def lock_of(out: Path) -> Path:
    """Return the lock file of the result ``out``, which lies beside it: the result does not exist yet."""
    return out.with_name(f".{out.name}.lock")


@contextmanager
def leading(out: Path) -> Iterator[None]:
    """Be the one writer of ``out`` while the block runs.

    Raises:
        CheckpointError: Another process writes it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with lock.hold(lock_of(out), out):
        yield


def admit(out: Path, beside: Path) -> None:
    """Let the others begin: the unfinished folder ``beside`` is as they must find it."""
    for path in _failures(beside):
        path.unlink()
    for path in beside.glob("rank.*.lock"):  # of a launch that was killed; from now on a dead one is one of ours
        if (owner := lock.read_owner(path)) and owner.alive() is False:
            path.unlink(missing_ok=True)
    (beside / LEADER).write_text(repr(lock.read_owner(lock_of(out))))


def is_whole(out: Path, beside: Path) -> bool:
    """Whether the result has its name, and nobody is making it anew."""
    return out.exists() and not beside.exists()


@contextmanager
def following(out: Path, beside: Path, rank: int, *, again: bool = False) -> Iterator[lock.Owner | None]:
    """Take part while the block runs, once the first process lets others begin.

    Args:
        out: The result.
        beside: The unfinished folder.
        rank: Which process this is.
        again: It has followed another one before, see :func:`wait_for_leader`: the result may be whole by now.

    Yields:
        Who the first process is; ``None`` where the result is whole.

    Raises:
        CheckpointError: A process of this number from an earlier launch still works there.
        RuntimeError: The first process ended.
    """
    leader: lock.Owner | None = None

    def admitted() -> bool:
        # A folder that a killed launch left has the name of that launch's leader in it.
        nonlocal leader
        if again and is_whole(out, beside):
            leader = None
            return True
        leader = lock.read_owner(lock_of(out))
        try:
            return leader is not None and leader.alive() is not False and (beside / LEADER).read_text() == repr(leader)
        except FileNotFoundError:
            return False

    lock.wait(admitted, lock_of(out), out)
    with ExitStack() as stack:
        if leader is not None:
            try:
                stack.enter_context(lock.hold(_place(beside, rank), out))
                _follows(beside, rank).write_text(repr(leader))
            except FileNotFoundError:
                if not again:
                    raise
                leader = None  # it has just got its name
        try:
            yield leader
        except BaseException:
            if beside.exists():
                _failure(beside, rank).touch()
            raise


def wait_for_leader(out: Path, beside: Path, leader: lock.Owner) -> bool:
    """Wait until the result is whole.

    Returns:
        Whether it is; else another first process has taken the place of this one, which was of an earlier launch. On
        another machine a dead one looks like a living one, until somebody takes its place.

    Raises:
        RuntimeError: The first process ended before.
    """
    while not is_whole(out, beside):
        owner = lock.read_owner(lock_of(out))
        # Looked at again afterwards: the leader may just have finished.
        if (owner != leader or owner.alive() is False) and not is_whole(out, beside):
            if owner is not None and owner != leader and owner.alive() is not False:
                return False
            raise RuntimeError(f"The first process ended before it finished {out}. Its own messages tell why.")
        time.sleep(0.02)
    return True


def wait_for_followers(ready: Callable[[], bool], out: Path, beside: Path, world: int) -> None:
    """Wait until every other process has come and all is ``ready``.

    Those that find all done already must have come too: else they would wait for a leader who has gone.

    Raises:
        RuntimeError: One of them ended before, or they did not come to an end in time.
    """
    most = lock.patience()
    deadline = time.monotonic() + most
    missing, me = set(range(1, world)), repr(lock.read_owner(lock_of(out)))
    while missing or not ready():
        for rank in range(1, world):
            owner = lock.read_owner(_place(beside, rank))
            # A lock alone may be that of an earlier launch, whose processes on other machines look alive from here.
            with suppress(FileNotFoundError):
                if _follows(beside, rank).read_text() == me:
                    missing.discard(rank)
            ended = owner is not None and owner.alive() is False and not ready()
            if ended or _failure(beside, rank).exists():
                raise RuntimeError(f"Process {rank} of {world} ended before it finished its share of {out}.")
        if time.monotonic() > deadline:
            raise RuntimeError(f"The other processes did not finish {out} within {most:.0f} s.")
        time.sleep(0.02)


def leave(beside: Path) -> None:
    """Remove what the processes told each other."""
    for path in [*beside.glob("rank.*"), beside / LEADER, *_failures(beside)]:
        path.unlink(missing_ok=True)


def _place(beside: Path, rank: int) -> Path:
    return beside / f"rank.{rank}.lock"


def _follows(beside: Path, rank: int) -> Path:
    return beside / f"rank.{rank}.follows"


def _failure(beside: Path, rank: int) -> Path:
    # Not inside: one that fails at the last moment would leave it in the finished result.
    return beside.with_name(f"{beside.name}.rank.{rank}.failed")


def _failures(beside: Path) -> list[Path]:
    return list(beside.parent.glob(f"{glob.escape(beside.name)}.rank.*.failed"))
