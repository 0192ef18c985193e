"""The weights that a routed model computes with: the host's own tensors, overwritten when the mixture changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from modicum.errors import CheckpointError
from modicum.weights.experts import ExpertSet


class WorkingWeights:
    """Writes mixtures of experts into the host's tensors.

    The tensors stay where they are, so a compiled or captured model stays valid. A mixture is left by writing the dense
    weights again, never by subtracting what was added, which would not give back the same bits.

    Args:
        host: The model.
        experts: Dense weights and stored differences.
        memory_bytes: How much copies of mixtures used before may take; 0 keeps none.
    """

    def __init__(self, host: nn.Module, experts: ExpertSet, *, memory_bytes: int = 0) -> None:
        self.experts = experts
        self.names = _own_names(host, experts)
        state = dict(host.named_parameters()) | dict(host.named_buffers())
        # The parameters themselves: moving the model to another device or dtype gives them other memory.
        self.targets = {name: state[own] for name, own in self.names.items()}
        for name, target in self.targets.items():
            if tuple(target.shape) != experts.shapes[name]:
                raise CheckpointError(
                    f"tensor {name!r} is {list(target.shape)} in the host and {list(experts.shapes[name])} in the "
                    "experts: they were built for another host. Use that one."
                )
        self.size = sum(target.nbytes for target in self.targets.values())
        self.room = memory_bytes // self.size if self.size else 0
        self.current: tuple[float, ...] = ()  # what the host holds is known once something was written
        self.written = 0  # mixtures made from the stored differences
        self._copies: OrderedDict[tuple[float, ...], list[Tensor]] = OrderedDict()
        self._pinned: dict[torch.device, Pinned] = {}

    @torch.no_grad()
    def set(self, weights: Sequence[float], *, centred: bool = False) -> None:
        """Let the host compute with these weights of the experts.

        Args:
            weights: One for each expert; rounded to a thousandth, so that near mixtures are one.
            centred: See :meth:`ExpertSet.state_dict`.
        """
        self.experts.about.coefficients(weights)  # refuses what are no weights, before they are rounded
        wanted = tuple(self.experts.about.coefficients(settled(weights), centred=centred))
        if wanted == self.current:
            return
        self.current = ()  # if writing fails half way, nothing is current
        if wanted in self._copies:
            self._copies.move_to_end(wanted)
            for target, copy in zip(self.targets.values(), self._copies[wanted]):
                target.detach().copy_(copy)
        else:
            self._write(wanted)
        self.current = wanted

    def _write(self, wanted: tuple[float, ...]) -> None:
        used = set()
        for name, target in self.targets.items():
            write = partial(self.experts.write_, name=name, coefficients=wanted)
            if target.device.type != "cuda":
                write(target.detach())
                continue
            if target.device not in self._pinned:
                most = max(t.nbytes for t in self.targets.values())
                self._pinned[target.device] = Pinned(target.device, most)
            self._pinned[target.device].send(target.detach(), write)
            used.add(target.device)
        for device in used:
            self._pinned[device].wait()
        self.written += 1
        if self.room and any(wanted):
            while len(self._copies) >= self.room:
                self._copies.popitem(last=False)
            self._copies[wanted] = [target.detach().clone() for target in self.targets.values()]

    def dense(self) -> None:
        """Let the host compute with the dense weights."""
        n = len(self.experts.about.names)
        if any(self.current) or len(self.current) != n:
            self._write((0.0,) * n)
            self.current = (0.0,) * n


def settled(weights: Sequence[float]) -> list[float]:
    """Return weights rounded to a thousandth, of sum 1 again; equal ones as they are.

    Example:
        >>> settled([0.33349, 0.66651, 0.0]), settled([1 / 3, 1 / 3, 1 / 3]) == [1 / 3] * 3
        ([0.333, 0.667, 0.0], True)
    """
    rounded = [round(float(w), 3) for w in weights]
    total = sum(rounded)
    return list(weights) if total == 0 or max(weights) - min(weights) < 1e-6 else [w / total for w in rounded]


class Pinned:
    """Two page-locked buffers and a stream: while one tensor travels to a CUDA device, the next one is made.

    Args:
        device: Where the tensors go.
        most: Bytes of the largest one.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self.device, self.turn = device, 0
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.buffers = [torch.empty(most, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]

    def send(self, target: Tensor, make: Callable[[Tensor], None]) -> None:
        """Let ``make`` write a tensor on the processor, and start its way to ``target``."""
        self.turn = 1 - self.turn
        self.copied[self.turn].synchronize()
        made = self.buffers[self.turn][: target.nbytes].view(target.dtype).view(target.shape)
        make(made)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # what still computes with the old weights
        with torch.cuda.stream(self.stream):
            target.copy_(made, non_blocking=True)
            self.copied[self.turn].record(self.stream)

    def wait(self) -> None:
        """Let the device compute no further before all have arrived."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


def _own_names(host: nn.Module, experts: ExpertSet) -> Mapping[str, str]:
    """Return what the host calls each routed tensor: a checkpoint may leave its prefix out."""
    own = {name for name, _ in host.named_parameters()} | {name for name, _ in host.named_buffers()}
    prefix = getattr(host, "base_model_prefix", "")
    found = {}
    for name in experts.routed:
        match = next((n for n in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if n in own), None)
        if match is None:
            raise CheckpointError(
                f"The experts change {name!r}, which the host does not have: they were built for another. Use that one."
            )
        found[name] = match
    return found
