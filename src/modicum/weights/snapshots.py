"""Copies of a model's weights on the way through a training, for averages afterwards."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.layout import unwrapped
from modicum.types import PositiveInt
from modicum.weights.averageable import State


@guarded
class Snapshots:
    """The latest snapshots of a model: owned copies, never views of weights that training goes on to change.

    Of a model that FSDP2 has sharded, each process keeps its own shards; nothing is gathered. Names of weights that are
    tied share one copy.

    Args:
        model: Whose weights are taken.
        keep: How many; the oldest one gives way to the next.
        trained: Take the parameters that are trained alone, and no frozen ones or buffers.
        device: Where copies go. From a GPU to ``"cpu"`` they go into pinned memory without waiting for the GPU.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> snapshots = Snapshots(model, keep=2)
        >>> for step in range(3):
        ...     _ = nn.init.constant_(model.weight, step)
        ...     snapshots.take(step)
        >>> snapshots.steps, [state["weight"].item() for state in snapshots.states()]
        ([1, 2], [1.0, 2.0])

    Cost:
        ``keep`` times the bytes of the model, and one copy each time.
    """

    def __init__(
        self, model: nn.Module, *, keep: PositiveInt = 20, device: str | torch.device = "cpu", trained: bool = False
    ) -> None:
        self.model, self.keep, self.device, self.trained = model, keep, torch.device(device), trained
        self._taken: deque[tuple[int, dict[str, Tensor]]] = deque(maxlen=keep)

    @property
    def steps(self) -> list[int]:
        """The steps at which the snapshots were taken, oldest first."""
        return [step for step, _ in self._taken]

    def __len__(self) -> int:
        return len(self._taken)

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Copy the model's weights and buffers as they are now; a second one of the same step replaces the first."""
        copies: dict[tuple[object, ...], Tensor] = {}
        state = {}
        for name, mine in self._now().items():
            key = (mine.data_ptr(), mine.shape, mine.stride(), mine.dtype) if mine.numel() else (name,)
            if key not in copies:
                copies[key] = self._copy(mine)
            state[name] = copies[key]
        while self._taken and self._taken[-1][0] >= step:
            self._taken.pop()  # a run that went on from an earlier step takes it again
        self._taken.append((step, state))

    def states(self) -> list[State]:
        """Return the snapshots, oldest first; each process has its own shards of a sharded model.

        They know which of their tensors are buffers, of which no mean is taken.
        """
        if self.device.type == "cpu" and torch.cuda.is_available():
            torch.cuda.synchronize()  # copies that are still on their way
        buffers = {name for name, _ in self.model.named_buffers()}
        return [State.of(state, buffers) for _, state in self._taken]

    def state_dict(self) -> dict[str, Any]:
        """Return steps and tensors, for ``torch.save`` and for :meth:`load_state_dict`."""
        return {"steps": self.steps, "states": [dict(state) for state in self.states()]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned; the tensors are copied.

        Raises:
            RecipeError: They are not of this model.
        """
        expected = self._now()
        self._taken.clear()
        for step, tensors in zip(state["steps"], state["states"], strict=True):
            if unlike := sorted(expected.keys() ^ tensors.keys()):
                raise RecipeError(f"The snapshot of step {step} differs in {unlike[0]!r}: it is of another model.")
            copies: dict[int, Tensor] = {}
            taken = {}
            for name, tensor in tensors.items():
                if tensor.shape != expected[name].shape:
                    raise RecipeError(
                        f"The snapshot of step {step} has {name!r} of shape {list(tensor.shape)}, expected "
                        f"{list(expected[name].shape)}: it is of another model, or of another number of processes."
                    )
                known = copies.get(tensor.data_ptr()) if tensor.numel() else None
                same = known is not None and known.shape == tensor.shape
                taken[name] = known if same and known is not None else self._copy(tensor)
                copies[tensor.data_ptr()] = taken[name]
            self._taken.append((int(step), taken))

    def _now(self) -> dict[str, Tensor]:
        """Return what is to be taken, as it is now: not copies."""
        if self.trained:
            return {unwrapped(name): local(p) for name, p in self.model.named_parameters() if p.requires_grad}
        # A module may store other things than tensors there.
        return {name: local(t) for name, t in self.model.state_dict().items() if torch.is_tensor(t)}

    def _copy(self, tensor: Tensor) -> Tensor:
        pinned = tensor.is_cuda and self.device.type == "cpu"
        owned = torch.empty_like(tensor, device=self.device, pin_memory=pinned, memory_format=torch.contiguous_format)
        return owned.copy_(tensor, non_blocking=pinned)


def local(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that FSDP2 has sharded, and any other tensor as it is."""
    to_local = getattr(tensor, "to_local", None)
    found: Tensor = tensor if to_local is None else to_local()
    return found.detach()
