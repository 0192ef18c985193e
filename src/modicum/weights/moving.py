r"""A moving average of weights in training, which can take their place for an evaluation or a save.

.. math::
    \bar\theta \leftarrow \beta \bar\theta + (1 - \beta)\,\theta

Of a low-rank adapter the *product* is averaged, :math:`\overline{s B A}`, not the factors: the product of two means is
another matrix. Everything is kept in float32, where a step of a long memory is not rounded away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modicum.errors import CheckpointError
from modicum.knobs import guarded
from modicum.layout import unwrapped
from modicum.linalg import truncated_svd
from modicum.types import Decay
from modicum.weights.snapshots import local


class Factors(NamedTuple):
    """The trained factors of one weight's change ``scale * B @ A``."""

    A: nn.Parameter
    B: nn.Parameter
    scale: float

    def delta(self) -> Tensor:
        """Return the change as it is now, in float32."""
        return self.scale * (self.B.detach().float() @ self.A.detach().float())


class Places:
    """The trained weights of a model, and how others are put in their place.

    Args:
        model: The model; of one that FSDP2 has sharded, each process sees its own shards.
        factors: Changes by an adapter, by the names of the weights that they change.
    """

    def __init__(self, model: nn.Module, factors: Mapping[str, Factors] | None = None) -> None:
        self.factors = dict(factors or {})
        mine = {id(part) for f in self.factors.values() for part in (f.A, f.B)}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in mine]
        self.own = {unwrapped(name): parameter for name, parameter in trained}
        self.held: dict[str, float] = {}

    def now(self) -> dict[str, Tensor]:
        """Return the weights that are no factors, as they are now: this process's shards, not copies."""
        return {name: local(parameter) for name, parameter in self.own.items()}

    @contextmanager
    def replaced(self, weights: Mapping[str, Tensor], deltas: Mapping[str, Tensor]) -> Iterator[None]:
        """Put other weights in place while the block runs; afterwards all are as before, bit for bit.

        A product takes the place of factors as the nearest one of their rank. ``held`` tells which share of its squared
        norm it keeps.
        """
        factors = [local(part) for f in self.factors.values() for part in (f.A, f.B)]
        places = [*self.now().values(), *factors]
        before = [tensor.clone() for tensor in places]
        try:
            with torch.no_grad():
                for name, tensor in self.now().items():
                    tensor.copy_(weights[name])
                for name, f in self.factors.items():
                    A, B, self.held[name] = nearest(deltas[name], f.A.shape[0])
                    local(f.A).copy_(A)
                    local(f.B).copy_(B / f.scale)
            yield
        finally:
            with torch.no_grad():
                for tensor, old in zip(places, before):
                    tensor.copy_(old)


def nearest(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Return factors ``A (rank, in)`` and ``B (out, rank)`` nearest to a matrix, and the share of it that they hold.

    Example:
        >>> A, B, held = nearest(torch.tensor([[3.0, 0.0], [0.0, 4.0]]), 1)
        >>> (B @ A).round().tolist(), round(held, 2)
        ([[0.0, 0.0], [0.0, 4.0]], 0.64)
    """
    total = float(delta.double().square().sum())
    k = min(rank, *delta.shape)
    U, S, V = truncated_svd(delta, k)
    root = S.clamp_min(0).sqrt()
    A, B = torch.zeros(rank, delta.shape[1]), torch.zeros(delta.shape[0], rank)
    A[:k], B[:, :k] = root[:, None] * V.T, U * root
    return A.to(delta.device), B.to(delta.device), float(S.double().square().sum()) / total if total else 1.0


@guarded
class MovingAverage:
    """The moving average of all trained weights; frozen ones are left out.

    Args:
        model: Whose weights are averaged. Of a model that FSDP2 has sharded, each process averages its own shards.
        decay: What one update multiplies the past by; ``None`` for the plain mean of all updates.
        factors: Changes by an adapter, by name: their products are averaged.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> average = MovingAverage(model, decay=0.5)
        >>> for value in (0.0, 1.0, 2.0):
        ...     _ = nn.init.constant_(model.weight, value)
        ...     average.update()
        >>> with average.in_place():
        ...     print(model.weight.item())
        1.25
        >>> model.weight.item()
        2.0

    Cost:
        An update reads the weights and writes the average once, in one fused operation; float32 beside the weights. Of
        an adapter, one product of its factors for each weight, and float32 of the size of these weights.
    """

    def __init__(
        self, model: nn.Module, *, decay: Decay | None = 0.999, factors: Mapping[str, Factors] | None = None
    ) -> None:
        self.decay, self.updates = decay, 0
        self.places = Places(model, factors)
        self._means: dict[str, Tensor] = {}
        self._deltas: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average; the first time they are the average."""
        now = self.places.now()
        if not self.updates:
            wide = {name: torch.promote_types(t.dtype, torch.float32) for name, t in now.items()}
            self._means = {name: t.to(wide[name], copy=True) for name, t in now.items()}
            self._deltas = {name: f.delta() for name, f in self.places.factors.items()}
        else:
            share = 1 / (self.updates + 1) if self.decay is None else 1 - self.decay
            _lerp([self._means[name] for name in now], list(now.values()), share)
            for name, f in self.places.factors.items():
                mean = self._deltas[name]  # (1 - share) * mean + share * scale * B @ A, without a product of its size
                torch.addmm(
                    mean, f.B.float(), f.A.float(), beta=1 - share, alpha=share * f.scale, out=mean
                )  # fmt: skip
        self.updates += 1

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the average in the weights' place while the block runs; afterwards they are as before, bit for bit.

        Raises:
            CheckpointError: There was no update yet.
        """
        if not self.updates:
            raise CheckpointError("The moving average has seen no step yet, so there is nothing to put in place.")
        with self.places.replaced(self._means, self._deltas):
            yield

    def state_dict(self) -> dict[str, Tensor]:
        """Return the average, this process's shards of it, and the number of updates."""
        means = {f"mean/{name}": tensor for name, tensor in self._means.items()}
        deltas = {f"delta/{name}": tensor for name, tensor in self._deltas.items()}
        return means | deltas | {"updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_dict` returned.

        Raises:
            CheckpointError: It is of another model, or of another number of processes.
        """
        means = {key.removeprefix("mean/"): t for key, t in state.items() if key.startswith("mean/")}
        deltas = {key.removeprefix("delta/"): t for key, t in state.items() if key.startswith("delta/")}
        now, factors = self.places.now(), self.places.factors
        if int(state["updates"]):
            for name in sorted((means.keys() ^ now.keys()) | (deltas.keys() ^ factors.keys())):
                raise CheckpointError(f"The saved average differs from the model in {name!r}. Start the run afresh.")
            for name, tensor in now.items():
                if means[name].shape != tensor.shape:
                    raise CheckpointError(
                        f"The saved average of {name!r} has shape {list(means[name].shape)}, expected "
                        f"{list(tensor.shape)}. Use as many processes as before, or start the run afresh."
                    )
        self._means = {name: tensor.to(now[name].device, copy=True) for name, tensor in means.items()}
        self._deltas = {name: tensor.to(factors[name].A.device, copy=True) for name, tensor in deltas.items()}
        self.updates = int(state["updates"])


def _lerp(means: Sequence[Tensor], now: Sequence[Tensor], share: float) -> None:
    """Move the means towards the weights, in one fused operation for those of one dtype."""
    same = [(mean, tensor) for mean, tensor in zip(means, now) if mean.dtype == tensor.dtype]
    if same:
        torch._foreach_lerp_([mean for mean, _ in same], [tensor for _, tensor in same], share)
    for mean, tensor in zip(means, now):
        if mean.dtype != tensor.dtype:  # one by one, so that one wide copy exists at a time
            mean.lerp_(tensor.to(mean.dtype), share)
