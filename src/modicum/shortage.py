"""Memory that runs out, of the machine or of a device: told in one line, and never taken for another fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from modicum.errors import MemoryShortageError, ModicumError

# What torch, its allocators and the libraries of devices say; none of them has an error that all others use.
SAID = re.compile(
    r"out of memory|can't allocate memory|cannot allocate memory|not enough memory|bad_alloc|_ALLOC_FAILED",
    re.IGNORECASE,
)
ASKED = re.compile(r"(?:tried|unable) to allocate ([\d.]+ ?\w+)", re.IGNORECASE)
DEVICE = re.compile(r"\b(CUDA|HIP|XPU|MPS|NPU)\b")
OWN = "A worker process"  # how our own pool tells of a process that the system ended


def is_shortage(error: BaseException) -> bool:
    """Whether an error means that memory ran out, so that another attempt may work with less.

    Example:
        >>> is_shortage(RuntimeError("CUDA out of memory.")), is_shortage(RuntimeError("shapes differ"))
        (True, False)
    """
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and SAID.search(str(error)) is not None)


def pass_on(error: BaseException) -> None:
    """Raise an error again if it means that memory ran out: whoever tries what a model can do must not blame the model.

    Example:
        >>> pass_on(RuntimeError("shapes differ"))
    """
    if is_shortage(error):
        raise error


@contextmanager
def shortage_told(lighter: str) -> Iterator[None]:
    """Turn the many words in which libraries say that memory ran out into one line.

    Args:
        lighter: What makes the work take less.

    Raises:
        MemoryShortageError: It ran out.
    """
    try:
        yield
    except ModicumError:
        raise
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        text = str(error)
        if text.startswith(OWN):
            raise MemoryShortageError(text) from error
        device, asked = DEVICE.search(text), ASKED.search(text)
        where = f"The memory of the {device[1]} device" if device else "The memory of this machine"
        more = f" when {asked[1]} more were asked for" if asked else ""
        raise MemoryShortageError(
            f"{where} ran out{more}. {lighter} Then run the same command again: what is finished stays."
        ) from error
