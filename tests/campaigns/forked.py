"""Commands of modicum in forked copies of one process that has loaded the libraries: thousands of them in minutes.

A copy begins where ``modicum`` begins once everything is imported, in a process group of its own; what it may take of
time and memory is limited. Killing such a copy is killing a process: what it leaves on the disk is what any would.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

GIB = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        status: Exit status, the negative number of the signal that ended it, ``None`` when it did not end in time.
        said: What it wrote to its error stream.
        seconds: How long it took by the clock.
        cpu: How long it computed, with its workers: what a hang is measured by where other programs compute too.
        peak: Bytes of memory that it took beyond what the libraries take.
    """

    status: int | None
    said: str
    seconds: float
    cpu: float
    peak: int

    def trouble(self, *, seconds: float = 5.0, memory: int = 2 * GIB) -> str | None:
        """Return what is wrong with how it ended, for a command whose input may be wrong in any way."""
        said = (line for line in self.said.splitlines() if line.strip())
        lines = [line for line in said if not line.startswith("modicum: warning: ")]
        if self.status in (None, -signal.SIGXCPU) or self.cpu > seconds:
            return f"took {self.cpu:.1f} s of computing in {self.seconds:.1f} s"
        if self.peak > memory:
            return f"took {self.peak / GIB:.1f} GiB"
        if self.status == 0:
            return "a traceback" if "Traceback" in self.said else None
        if self.status != 2:
            return f"exit status {self.status}: {' | '.join(lines[-3:])[:400]}"
        if len(lines) != 1:
            return f"{len(lines)} lines: {' | '.join(lines)[:400]}"
        if any(ord(character) < 32 or 127 <= ord(character) < 160 for character in lines[0]):
            return f"control characters: {lines[0]!r}"
        return None


class Attempt:
    """A command that was started.

    Args:
        arguments: Those of ``modicum``.
        folder: Where it runs.
        variables: Added to the environment.
        memory: Bytes of address space that it may take beyond what is taken already.
        cpu: Seconds that it may compute.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        variables: Mapping[str, str] | None = None,
        memory: int = 6 * GIB,
        cpu: int = 300,
    ) -> None:
        self._said = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - it lives as long as the attempt
        self.began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(arguments, folder, variables or {}, self._said.fileno(), memory, cpu)

    def wait(self, seconds: float | None = None, *, reap: bool = True) -> Outcome | None:
        """Wait for its end; ``None`` when it has not come within so many seconds after the start.

        Args:
            seconds: How long to wait at most.
            reap: End its workers too, where it left some.
        """
        deadline = None if seconds is None else self.began + seconds
        pause = 0.002
        while True:
            pid, status, used = os.wait4(self.pid, 0 if deadline is None else os.WNOHANG)
            if pid:
                break
            if deadline is not None and time.monotonic() >= deadline:
                return None
            # Not beyond the deadline: moments of kills are not to fall on the steps of this loop.
            time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))
            pause = min(0.02, pause * 1.5)
        if reap:
            self.kill(signal.SIGKILL, group=True)
        self._said.seek(0)
        said = self._said.read().decode("utf-8", "replace")
        self._said.close()
        base = _resident()
        code = os.waitstatus_to_exitcode(status)
        computed = used.ru_utime + used.ru_stime
        return Outcome(code, said, time.monotonic() - self.began, computed, max(0, used.ru_maxrss * 1024 - base))

    def kill(self, number: int, *, group: bool = False) -> None:
        """Send a signal to the process, or to it and all of its workers."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number) if group else os.kill(self.pid, number)


def attempt(arguments: Sequence[str], folder: Path, *, seconds: float = 60.0, **options: object) -> Outcome:
    """Run a command to its end, or for so many seconds."""
    started = Attempt(arguments, folder, **options)  # type: ignore[arg-type]
    found = started.wait(seconds)
    if found is not None:
        return found
    started.kill(signal.SIGKILL, group=True)
    ended = started.wait()
    return Outcome(None, ended.said, seconds, ended.cpu, ended.peak) if ended else Outcome(None, "", seconds, 0.0, 0)


def warm(commands: Sequence[Sequence[str]], folder: Path, known: Path) -> dict[str, Outcome]:
    """Import here what these commands import, by running each in a copy; return how those ended that did not end well.

    Args:
        commands: Arguments of ``modicum``.
        folder: Where they run.
        known: File of the modules' names, so that the next process need not run the commands again.
    """
    failed = {}
    if not known.exists():
        for command in commands:
            with tempfile.NamedTemporaryFile("r") as names:
                found = attempt(command, folder, seconds=300, variables={"CAMPAIGN_MODULES": names.name})
                _import(names.read().split())
            if found.status != 0:
                failed[" ".join(command)] = found
        known.write_text("\n".join(sys.modules))
    _import(known.read_text().split())
    return failed


def _import(names: Sequence[str]) -> None:
    for name in names:
        if name not in sys.modules and not name.startswith(("_pytest", "pytest")):
            with suppress(BaseException):
                importlib.import_module(name)


def _become(
    arguments: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    said: int,
    memory: int,
    cpu: int,
) -> NoReturn:
    status = 70
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor, target in ((0, null), (1, null), (2, said)):
            os.dup2(target, descriptor)
        sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
        os.chdir(folder)
        os.environ.update(variables)
        faulthandler.register(signal.SIGUSR1, file=2)  # what a process that hangs is asked
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        if (machine := os.environ.get("CAMPAIGN_MACHINE")) is not None:
            _other_machine(machine)
        if "CAMPAIGN_NO_SYNC" in os.environ:
            os.fsync = os.fdatasync = lambda _: None
        if (moment := os.environ.get("CAMPAIGN_CHANGES")) is not None:
            _count_changes(*moment.split(":", 1))
        _like_any_user()
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + memory, taken + memory))
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu))
        from modicum.cli import main

        sys.argv = ["modicum", *arguments]
        try:
            main()
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
        if (names := os.environ.get("CAMPAIGN_MODULES")) is not None:
            Path(names).write_text("\n".join(sys.modules))
    except KeyboardInterrupt:
        status = 130  # before there was a command to interrupt
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 71
    finally:
        with suppress(BaseException):
            sys.stderr.flush()
        os._exit(status)


def _count_changes(last: str, path: str) -> None:
    """Kill whichever process of this command is about to change the disk for the ``last``-th time, as Python tells.

    A file is opened for writing, a name is made, moved or removed. The bytes written so far are the size of the file at
    ``path``, which all processes of the command share.
    """
    counted = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    moves = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"}
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def look(event: str, values: tuple[Any, ...]) -> None:
        if event in moves or (event == "open" and isinstance(values[2], int) and values[2] & writing):
            os.write(counted, b".")
            if os.fstat(counted).st_size == int(last):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def _like_any_user() -> None:
    """Give up what lets root read and write files whose modes forbid it."""
    import ctypes

    if sys.platform != "linux" or os.geteuid() != 0:
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)
    held = (ctypes.c_uint32 * 6)()
    libc.capget(header, held)
    for at in (0, 1):  # effective and permitted: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        held[at] &= ~0b110
    if libc.capset(header, held) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _other_machine(name: str) -> None:
    """Give this process a host name and a boot id of its own, as on another machine that shares the disk."""
    import ctypes
    import subprocess
    import uuid

    new_mounts, new_names = 0x00020000, 0x04000000  # CLONE_NEWNS and CLONE_NEWUTS of Linux
    if ctypes.CDLL(None, use_errno=True).unshare(new_mounts | new_names) != 0:
        raise OSError(ctypes.get_errno(), "unshare")
    socket.sethostname(name)
    boot = Path(tempfile.gettempdir(), f"boot-{name}-{os.getpid()}")
    boot.write_text(f"{uuid.uuid5(uuid.NAMESPACE_DNS, name)}\n")
    for command in (["--make-rprivate", "/"], ["--bind", str(boot), "/proc/sys/kernel/random/boot_id"]):
        subprocess.run(["mount", *command], check=True)
    boot.unlink()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
