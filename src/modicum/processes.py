"""The processes that share a run: which one this is, and the few numbers that they tell each other.

``torchrun`` and ``accelerate launch`` start every process with ``RANK`` and ``WORLD_SIZE``; a training connects them
with ``torch.distributed``, a merge does not. Importing this module imports no torch: every command asks who writes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from modicum.errors import UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
LOOK, GRACE = 0.5, 5.0  # seconds between two looks at the launcher, and those that a process has to stop by itself


def hush_libraries() -> None:
    """Leave out what other libraries say to their own developers, which helps nobody here."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="(?!modicum)")
    warnings.filterwarnings("ignore", message="Could not find a config file in builtin:")


def end_with_launcher() -> None:
    """End this process soon after the one that started it, where several share a run.

    A launcher that is killed (a shell closed, a job cancelled) leaves its processes behind, which would go on alone, or
    wait for each other for ever. This one is told to stop, as by Ctrl-C, and ended when it does not.
    """
    if world() > 1 and os.name == "posix":
        launcher = None if _orphaned() else os.getppid()
        threading.Thread(target=_watch, args=(launcher,), name="launcher", daemon=True).start()


def _orphaned() -> bool:
    """Whether torch's launcher, a Python, has gone before it could be looked at: the system's first process took over.

    In a container that first process may be the launcher itself.
    """
    if os.getppid() != 1 or "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        first = Path("/proc/1/cmdline").read_bytes().partition(b"\0")[0]
    except OSError:
        return False  # not Linux
    return first != b"" and b"python" not in first


def _watch(launcher: int | None) -> None:
    while os.getppid() == launcher:
        time.sleep(LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)  # it waits inside a library that hears no signal


def _group() -> Any:
    """Return ``torch.distributed`` when it connects the processes, else ``None``."""
    # Whoever has connected them has imported the module.
    group = sys.modules.get("torch.distributed")
    return group if group is not None and group.is_available() and group.is_initialized() else None


def rank() -> int:
    """This process's number."""
    group = _group()
    return int(group.get_rank() if group else os.environ.get("RANK", "0"))


def world() -> int:
    """Number of processes."""
    group = _group()
    return int(group.get_world_size() if group else os.environ.get("WORLD_SIZE", "1"))


def connected() -> bool:
    """Whether ``torch.distributed`` connects the processes, so that they can tell each other numbers."""
    return _group() is not None


def main() -> bool:
    """Whether this is the first process, the only one that writes to a run's folder."""
    return rank() == 0


def mean(sums: Tensor, weight: float) -> Tensor:
    """Return the weighted mean of each number over all processes, uneven shards included.

    Args:
        sums: Weighted sums over this process's share.
        weight: Sum of the weights of this share.
    """
    group = _group()
    if group is None or world() == 1:
        return sums / weight
    import torch

    message = torch.cat([sums, sums.new_tensor([weight])])
    group.all_reduce(message)
    return message[:-1] / message[-1]


def average(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its mean over all processes, in one message."""
    group = _group()
    if group is None or world() == 1 or not tensors:
        return
    import torch

    flat = torch.cat([tensor.flatten() for tensor in tensors])
    group.all_reduce(flat)
    flat /= world()
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors])):
        tensor.copy_(part.view_as(tensor))


def gather(values: Tensor) -> Tensor:
    """Return the values of all processes, in the order of their numbers.

    Raises:
        UnsupportedError: There are several processes, but nothing connects them.
    """
    if world() == 1:
        return values
    group = _group()
    if group is None:
        raise UnsupportedError(
            f"{world()} processes were started, but torch.distributed does not connect them. "
            "Call torch.distributed.init_process_group first."
        )
    import torch

    parts = [torch.empty_like(values) for _ in range(world())]
    group.all_gather(parts, values.contiguous())
    return torch.cat(parts)


def wait() -> None:
    """Return once all processes have come here."""
    if group := _group():
        group.barrier()


def broadcast(tensor: Tensor) -> Tensor:
    """Give ``tensor`` the values that it has on the first process, in place, and return it."""
    if group := _group():
        group.broadcast(tensor, src=0)
    return tensor


def broadcast_object(value: T) -> T:
    """Return the first process's ``value``, which is pickled on the way: nothing from outside the run."""
    if not (group := _group()):
        return value
    told = [value]
    group.broadcast_object_list(told, src=0)
    return told[0]
