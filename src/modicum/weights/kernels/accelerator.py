"""How tensors reach an accelerator and return, so that copies and arithmetic of several threads overlap."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_streams = threading.local()
SHARE = 0.8  # of the free memory: the allocator rounds up, and factorisations want room to work in


@contextmanager
def own_stream(device: str) -> Iterator[None]:
    """Let this thread compute on a CUDA stream of its own: small kernels and factorisations leave room for others'.

    What is made inside must be copied to memory inside, where the copy waits for it.
    """
    kind = torch.device(device)
    if kind.type != "cuda":
        yield
        return
    if getattr(_streams, "of", None) is None or _streams.of[0] != device:
        _streams.of = device, torch.cuda.Stream(kind)  # type: ignore[no-untyped-call]
    with torch.cuda.stream(_streams.of[1]):
        yield


def placed(tensor: Tensor, device: str) -> Tensor:
    """Return the tensor on a device; to CUDA by page-locked memory, whose copies others need not wait for."""
    if torch.device(device).type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def workers_on(device: str, needs: Iterable[int], most: int) -> int:
    """Return how many threads may work side by side, so that what each makes fits into the device's free memory.

    Args:
        device: Where they compute; in the machine's own memory ``most`` of them work.
        needs: Bytes that each piece of work takes.
        most: No more than these.
    """
    kind = torch.device(device)
    if kind.type != "cuda":
        return most
    free, _ = torch.cuda.mem_get_info(kind)
    room, fitting = SHARE * free, 0
    for need in sorted(needs, reverse=True)[:most]:  # the largest come first, and together
        room -= need
        fitting += room >= 0
    return max(1, fitting)
