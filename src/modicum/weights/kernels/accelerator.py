"""How tensors reach an accelerator and return, so that copies and arithmetic of several threads overlap."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_streams = threading.local()


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
