"""What zeroth-order processes tell each other: a few numbers a step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> int:
    """Number of processes; one when ``torch.distributed`` is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if world() > 1 else 0


def mean(sums: Tensor, weight: float) -> Tensor:
    """Return the weighted mean loss of each point over all processes, uneven shards included."""
    if world() == 1:
        return sums / weight
    message = torch.cat([sums, sums.new_tensor([weight])])
    dist.all_reduce(message)
    return message[:-1] / message[-1]


def gather(kappas: Tensor) -> Tensor:
    """Return the coefficients of all processes' queries, in the order of their numbers."""
    if world() == 1:
        return kappas
    parts = [torch.empty_like(kappas) for _ in range(world())]
    dist.all_gather(parts, kappas.contiguous())
    return torch.cat(parts)
