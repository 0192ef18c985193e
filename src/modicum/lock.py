"""One writer for each folder: a lock file says who writes there.

The file names host, process and the time at which the process started, so that a number given to another process since
is not taken for the owner. A lock whose owner is dead is taken over; one of a living owner, or of a machine that cannot
be looked at from here, is refused. Of processes that share a run, one holds it and others follow (:func:`wait`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from modicum.borders import OURS, check_plain, loads
from modicum.durable import REMOVED
from modicum.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
CLAIM = ".claim"  # how the lock of a cell ends, in a folder that several processes fill
LEFT = re.compile(r"\.(?:.+\.)?(?:lock|claim)\.([0-9a-f]{12})([0-9a-f]{8})[0-9a-f]{12}")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_PID = 2**31 - 1
LARGEST = 1 << 16  # bytes of a lock file
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: Its machine's name.
        machine: What tells machines of one name apart.
        boot: Which start of the machine.
        namespace: Which of the machine's worlds of process numbers (containers have their own).
        pid: Its number.
        started: When it started, in the system's own words.
        since: When it took the lock, for people.
        launch: What the processes of one ``torchrun`` have in common.
    """

    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    started: str
    since: str
    launch: str

    def alive(self) -> bool | None:
        """Whether the process still runs; ``None`` when that cannot be seen from here."""
        here = _me()
        if (self.host, self.machine) != (here.host, here.machine):
            return None
        if self.boot != here.boot:
            return False
        if self.namespace != here.namespace:
            return None
        started = _start_of(self.pid)
        return _exists(self.pid) and (started is None or not self.started or started == self.started)


class HeldError(CheckpointError):
    """Another process, or another part of this one, holds the lock."""


@contextmanager
def hold(path: Path, what: str | Path) -> Iterator[None]:
    """Hold the lock file ``path`` while the block runs.

    Args:
        path: The lock file; its folder must exist.
        what: Whatever the lock protects, for the error.

    Raises:
        HeldError: Another process, or another part of this one, writes there.
    """
    me = _me()
    beside = path.with_name(f"{path.name}.{_mark(me)}")
    try:
        _write(beside, me)
        while not _create(beside, path, me):
            owner = read_owner(path)
            if owner is None:
                continue  # released in the meantime
            if owner.alive() is not False:
                raise HeldError(_refusal(owner, path, what))
            if _take_over(beside, path, owner):
                break
    finally:
        beside.unlink(missing_ok=True)
    try:
        yield
    finally:
        # A forked worker inherits this block, and must not end its parent's lock. Nor may a process whose lock was
        # removed by hand end that of the next one.
        if os.getpid() == me.pid and read_owner(path) == me:
            path.unlink(missing_ok=True)


def enter(locks: ExitStack, path: Path, what: str | Path) -> bool:
    """Hold the lock file ``path`` until ``locks`` are closed, unless another one holds it.

    Args:
        locks: What ends with the work that is locked.
        path: The lock file; its folder must exist.
        what: Whatever the lock protects.

    Returns:
        Whether the work may begin: it is ours, or of an owner that cannot be looked at, who may be dead. What such a
        one does is done twice rather than never.
    """
    try:
        locks.enter_context(hold(path, what))
    except HeldError:
        owner = read_owner(path)
        return owner is not None and owner.alive() is None
    return True


def read_owner(path: Path, *, tries: int = 50) -> Owner | None:
    """Return who holds the lock file ``path``; ``None`` when nobody does.

    Args:
        path: The lock file.
        tries: How often it is read until its content is there.

    Raises:
        CheckpointError: The file is not a lock.
    """
    for left in reversed(range(tries)):
        try:
            return _owner(path)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            if left:
                time.sleep(0.02)  # where there are no links, the file exists before its content does
    raise CheckpointError(f"{path} is no lock file that can be read. If nothing writes there, delete it and run again.")


def _owner(path: Path) -> Owner:
    check_plain(path, OURS)
    if path.is_symlink() or path.stat().st_size > LARGEST:  # one to nowhere is there for whoever makes the lock alone
        raise ValueError("no lock is a link, or so large")
    owner = Owner(**loads(path.read_text(encoding="utf-8")))
    words = [value for name, value in asdict(owner).items() if name != "pid"]
    # A signal to process 0, or to a number below it, would go to a whole group.
    if type(owner.pid) is not int or not 1 <= owner.pid <= MOST_PID or not all(isinstance(w, str) for w in words):
        raise ValueError("no process has this number")
    return owner


def is_left(path: Path) -> bool:
    """Whether a file is what a process that was killed had written to take a lock with."""
    mark = LEFT.fullmatch(path.name)
    if mark is None:
        return False
    try:
        return _owner(path).alive() is False
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):  # it may be just being written
        if mark[1] == _place(_me()) and not _exists(int(mark[2], 16)):
            return True
        return time.time() - path.stat().st_mtime > 10


def remove_leftovers(folder: Path) -> None:
    """Remove files that a killed process was writing, and what it had not removed yet of a folder.

    Stages and checkpoints are looked after by their own.

    Raises:
        CheckpointError: A pipe, a socket or a device lies in the place of a file.
    """
    for place, folders, files in os.walk(folder):
        for name in folders:
            if name.startswith(".") and name.endswith(REMOVED):
                shutil.rmtree(Path(place, name), ignore_errors=True)
        folders[:] = [name for name in folders if name != "stages" and Path(place, name).is_dir()]
        own = "checkpoints" not in Path(place).relative_to(folder).parts
        for path in (Path(place, name) for name in files):
            check_plain(path, OURS)  # opening it to read or write would wait without an end
            if own and (re.fullmatch(r"\..+\.\d+", path.name) or is_left(path)):
                path.unlink(missing_ok=True)


def remove_claims(folder: Path) -> None:
    """Remove what killed processes left of claims in a folder, which others may be filling at this moment."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if is_left(path):
            path.unlink(missing_ok=True)
        elif path.name.startswith(".") and path.name.endswith(CLAIM):
            with suppress(CheckpointError, OSError), hold(path, folder):  # a dead process's is taken over, and so ends
                pass


def patience() -> float:
    """Return for how many seconds processes of one launch wait for each other: ``MODICUM_STAGE_TIMEOUT``, or a day."""
    return float(os.environ.get("MODICUM_STAGE_TIMEOUT", 24 * 3600))


def wait(ready: Callable[[], bool], path: Path, what: str | Path, *, seen: bool = False, every: float = 0.05) -> bool:
    """Wait until ``ready``, as long as the first process of this launch holds the lock file ``path``.

    Args:
        ready: Looks at the folder that the processes share.
        path: The first process's lock.
        what: Whatever the first process should finish, for the error.
        seen: The first process held the lock before: if it does not now, it has ended.
        every: Seconds between two looks.

    Returns:
        Whether the first process was seen to hold the lock, for the next wait.

    Raises:
        RuntimeError: The first process gave up its lock or died, or did not come to an end within
            :func:`patience`.
    """
    most = patience()
    deadline, launch = time.monotonic() + most, _me().launch
    while not ready():
        # A lock of an earlier launch means nothing: ours may not have come that far yet.
        owner = read_owner(path)
        held = owner is not None and owner.launch == launch and owner.alive() is not False
        if seen and not held:
            if ready():
                break
            raise RuntimeError(f"The first process ended before it finished {what}. Its own messages tell why.")
        seen = held
        if time.monotonic() > deadline:
            raise RuntimeError(f"The first process did not finish {what} within {most:.0f} s.")
        time.sleep(every)
    return seen


def check_exclusive(folder: Path) -> None:
    """Refuse a folder on whose file system two processes could both make one file, so that no lock would hold.

    Raises:
        CheckpointError: A second process would not be told that a file exists already.
    """
    probe = folder / f".exclusive.lock.{_mark(_me())}"  # :func:`is_left` knows this name
    try:
        probe.open("x").close()
        try:
            probe.open("x").close()
        except FileExistsError:
            return
        raise CheckpointError(
            f"The file system of {folder} makes a file twice, so several processes would do the same work there. "
            "Choose a folder on another one."
        )
    finally:
        probe.unlink(missing_ok=True)


def wait_until_free(path: Path, *, every: float = 0.2) -> None:
    """Return once nobody who may be alive holds the lock file ``path``."""
    while (owner := read_owner(path)) is not None and owner.alive() is not False:
        time.sleep(every)


def _refusal(owner: Owner, path: Path, what: str | Path) -> str:
    if owner.alive() is None:
        return (
            f"{what} is being written by process {owner.pid} on {owner.host} since {owner.since}, which cannot be "
            f"looked at from here. Wait for it; if it has ended, delete {path} and run again."
        )
    if owner.pid == os.getpid():
        return f"{what} is being written by this very process. Wait until that is done, or choose another folder."
    return (
        f"{what} is being written by process {owner.pid} on {owner.host} since {owner.since}. "
        "Wait until it ends, or choose another folder."
    )


def _write(path: Path, owner: Owner) -> None:
    with path.open("x", encoding="utf-8") as file:
        try:
            json.dump(asdict(owner), file)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink()  # the disk is full: an empty lock would shut everyone out
            raise


def _create(beside: Path, path: Path, owner: Owner) -> bool:
    """Make ``path`` appear with its content, unless it exists."""
    try:
        os.link(beside, path)
    except FileExistsError:
        # NFS may repeat a request that it has done already: the number of links tells.
        return beside.stat().st_nlink == 2
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        try:
            _write(path, owner)
        except FileExistsError:
            return False
    return True


def _take_over(beside: Path, path: Path, dead: Owner) -> bool:
    """Put our lock in the place of a dead owner's, of which others may be taking possession too."""
    try:
        with path.open("r+") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever waited for the kernel's lock holds a file that is the lock no more.
            if not os.path.samestat(os.fstat(file.fileno()), path.stat()) or read_owner(path) != dead:
                return False
            beside.replace(path)
            return True
    except FileNotFoundError:
        return False


def _place(owner: Owner) -> str:
    """Return what tells the world of process numbers from others that share the disk, in 12 digits."""
    told = "\0".join((owner.host, owner.machine, owner.boot, owner.namespace))
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def _mark(owner: Owner) -> str:
    """Return how the name of a file ends that a process writes: it tells whose it is before it holds a word."""
    return f"{_place(owner)}{owner.pid:08x}{uuid.uuid4().hex[:12]}"


def _me() -> Owner:
    host = socket.gethostname()
    address = os.environ.get("MASTER_ADDR", "")
    launch = (host if address in LOOPBACK else address, os.environ.get("MASTER_PORT", ""))
    try:
        namespace = os.readlink("/proc/self/ns/pid")  # noqa: PTH115 - its target is no path
    except OSError:
        namespace = ""
    return Owner(
        host=host,
        machine=_read("/etc/machine-id"),
        boot=_read("/proc/sys/kernel/random/boot_id"),
        namespace=namespace,
        pid=os.getpid(),
        started=_start_of(os.getpid()) or "",
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        launch=":".join(launch),
    )


def _exists(pid: int) -> bool:
    if os.name != "posix":
        return True  # signal 0 would end the process there
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # another user's
    return True


def _start_of(pid: int) -> str | None:
    """Return when a process started, ``""`` when it has ended and nobody took notice, ``None`` when that is hidden."""
    stat = _read(f"/proc/{pid}/stat")
    if stat:
        # The name in parentheses may hold anything; the state is field 3, the start field 22.
        fields = stat.rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]
    if Path("/proc/self/stat").exists() or os.name != "posix":
        return None
    command = ["ps", "-o", "lstart=", "-p", str(pid)]
    told = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no words of a user's
    return told.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""
