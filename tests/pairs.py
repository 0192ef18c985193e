"""Two processes of one group, for tests of what they tell each other."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[..., object], *arguments: Any) -> None:
    """Call ``work(rank, *arguments)`` in two new processes that are connected by gloo; fail when either fails.

    Args:
        work: A function at the top of its module, since the processes import it.
        arguments: What pickle can hold.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_member, args=(folder, work, arguments), nprocs=2)


def _member(rank: int, folder: str, work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    work(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # A thread of gloo that still runs when the interpreter ends aborts the process now and then, after all was done.
    sys.stdout.flush()
    os._exit(0)
