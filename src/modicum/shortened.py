"""Say in one line which file became shorter while it was mapped, which ends the process that reads it (SIGBUS).

Weights are read through memory maps. Where somebody truncates such a file, the next access to what is gone is a signal
that no ``except`` sees, and the process ends without a word. The command line therefore installs a handler that finds
the file in the list of the process's maps.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path
from typing import Any

ADDRESS = 16  # where siginfo_t holds the address, on 64-bit Linux
WITH_INFO = 4  # SA_SIGINFO
MASK = 128  # bytes of a sigset_t
_installed: list[Any] = []  # what C refers to must stay


class _Action(ctypes.Structure):
    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_char * MASK),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


def install() -> None:
    """Install the handler in this process; does nothing where the system is not 64-bit Linux."""
    if sys.platform != "linux" or ctypes.sizeof(ctypes.c_void_p) != 8 or _installed:
        return
    here = os.getpid()

    def tell(_number: int, info: int, _context: int) -> None:
        if os.getpid() == here:  # a worker ends silently: the first process sees why, and tells
            path = mapped_at(ctypes.c_uint64.from_address(info + ADDRESS).value) or "a file that is being read"
            line = f"modicum: {path} became shorter while it was read. Run again when nothing writes to it any more.\n"
            os.write(2, line.encode("utf-8", "replace"))
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(tell)
    action = _Action(ctypes.cast(handler, ctypes.c_void_p).value, b"", WITH_INFO, None)
    _installed.append(handler)
    ctypes.CDLL(None).sigaction(int(signal.SIGBUS), ctypes.byref(action), None)


def mapped_at(address: int) -> str | None:
    """Return the file that is mapped at an address of this process."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        span, *_, path = line.split(maxsplit=5)
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return path if path.startswith("/") else None
    return None
