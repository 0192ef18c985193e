"""How agents average with their neighbours: all on one machine, or each in a process of its own.

Both give the same numbers. What is sent in a round by an agent is its copy, ``n`` numbers of 8 bytes, to each
neighbour; with ``foreign="float16"`` only the agent's own block keeps 8 bytes, and what it merely passes on takes 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.submodular.draws import keys, uniform
from modicum.submodular.graphs import check_weights
from modicum.submodular.partition import Partition
from modicum.types import NonNegativeInt, UnitInterval

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Weights: TypeAlias = Any  # a matrix, a function from the round to one, or a Communication
Foreign: TypeAlias = Literal["float64", "float16"]


class Communication:
    """What a policy asks of the network between its agents.

    Attributes:
        agents: Numbers of the agents whose copies this process holds.
        count: How many agents there are.
        bytes: What was sent so far by these agents.
    """

    agents: Tensor
    count: int
    bytes: int = 0
    device: torch.device = torch.device("cpu")

    def average(self, x: Tensor, partition: Partition, turn: int, *, scratch: bool = False) -> Tensor:
        """Return each held agent's weighted mean over its neighbours and itself.

        Args:
            x: The copies that are held, (..., agents held, n).
            partition: Whose the elements are.
            turn: Number of the round.
            scratch: The round is tried out, and is no part of the history of late messages.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Return what must be known to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""


class Simulated(Communication):
    """All agents on one machine: the average is a product with ``W``.

    Args:
        W: Weights, (N, N), or a function from the round to weights, for graphs that change.
        adjacency: The graph whose links alone may carry weight.
        drop: Probability that a message is lost; its receiver uses its own copy instead.
        delay: Messages arrive so many rounds late.
        foreign: How an agent sends the blocks of others.
        seed: Seed of the losses.

    Raises:
        RecipeError: The weights are no doubly stochastic weights of a connected graph, or a knob is out of range.

    Example:
        >>> network = Simulated([[0.5, 0.5], [0.5, 0.5]])
        >>> network.average(torch.eye(2, dtype=torch.float64), Partition.of([1, 1]), 0)[0].tolist(), network.bytes
        ([0.5, 0.5], 32)
    """

    def __init__(
        self,
        W: Any,
        *,
        adjacency: Any = None,
        drop: UnitInterval = 0.0,
        delay: NonNegativeInt = 0,
        foreign: Foreign = "float64",
        seed: int = 0,
    ) -> None:
        if not 0 <= drop <= 1:
            raise RecipeError(f"drop is {drop}, expected a probability in [0, 1].")
        if delay < 0:
            raise RecipeError(f"delay is {delay}, expected at least 0 rounds.")
        check_foreign(foreign)
        self._of = W if callable(W) else None
        self.W = check_weights(W(0) if callable(W) else W, adjacency=adjacency)
        self.adjacency, self.drop, self.delay, self.foreign = adjacency, drop, delay, foreign
        self.count, self.device = len(self.W), self.W.device
        self.agents = torch.arange(self.count, device=self.device)
        self._keys = keys([seed], "drop", range(self.count), device=self.device)[0] if drop else None
        self._sent: list[Tensor] = []
        self._size: tuple[Tensor, Partition, int] | None = None

    def _round_bytes(self, partition: Partition) -> int:
        """Return what all agents send in a round over the present weights."""
        if self._size is None or self._size[0] is not self.W or self._size[1] is not partition:
            self._size = (self.W, partition, message_bytes(partition, self.foreign, self.W))
        return self._size[2]

    def weights(self, turn: int) -> Tensor:
        """Return the weights of a round, those of lost messages given to the receivers themselves."""
        if self._of is not None:
            self.W = check_weights(self._of(turn), adjacency=self.adjacency, agents=self.count)
        if self._keys is None:
            return self.W
        lost = uniform(self._keys, turn, self.count) < self.drop
        lost.fill_diagonal_(False)
        gone = torch.where(lost, self.W, 0)
        return self.W - gone + torch.diag(gone.sum(1))

    def average(self, x: Tensor, partition: Partition, turn: int, *, scratch: bool = False) -> Tensor:
        """Return every agent's weighted mean (see :meth:`Communication.average`)."""
        W = self.weights(turn)
        self.bytes += self._round_bytes(partition) * x.shape[:-2].numel()
        if self.foreign == "float64" and not self.delay:
            return W @ x
        sent = x
        if self.foreign == "float16":
            # What belongs to the sender keeps its digits.
            mine = partition.owner == self.agents[:, None]
            sent = torch.where(mine, x, x.half().to(x.dtype))
        if self.delay and not scratch:
            self._sent = [*self._sent[-self.delay :], sent]
            sent = self._sent[0] if len(self._sent) > self.delay else x
        own = W.diagonal()
        return (W - torch.diag(own)) @ sent + own[:, None] * x

    def state_dict(self) -> dict[str, Tensor]:
        """Return the messages that are still under way."""
        return {"sent": torch.stack(self._sent)} if self._sent else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the messages that were under way."""
        self._sent = [*state["sent"]] if "sent" in state else []


class PointToPoint(Communication):
    """One agent in each process; messages go to neighbours alone, over ``torch.distributed``.

    Args:
        group: The processes, in the order of the agents; the default group where ``None``.
        W: Weights, (N, N), the same in every process.
        adjacency: The graph whose links alone may carry weight.
        foreign: How an agent sends the blocks of others.

    Raises:
        RecipeError: The weights are no doubly stochastic weights of a connected graph, or for another number of agents.
        UnsupportedError: The processes are not connected, or a neighbour does not answer.
    """

    def __init__(
        self, group: ProcessGroup | None, W: Any, *, adjacency: Any = None, foreign: Foreign = "float64"
    ) -> None:
        import torch.distributed as dist

        check_foreign(foreign)
        if not (dist.is_available() and dist.is_initialized()):
            raise UnsupportedError(
                "PointToPoint needs processes that are connected: start them with torchrun, and call "
                "torch.distributed.init_process_group first."
            )
        self.group = group if group is not None else dist.group.WORLD
        self.W = check_weights(W, adjacency=adjacency, agents=dist.get_world_size(self.group))
        self.count, self.foreign, self.device = len(self.W), foreign, self.W.device
        self.rank = dist.get_rank(self.group)
        self.agents = torch.tensor([self.rank], device=self.device)
        self.neighbours = [j for j in range(self.count) if j != self.rank and bool(self.W[self.rank, j] > 0)]
        named: Any = self.group
        self._peers = {j: dist.get_global_rank(named, j) for j in self.neighbours}

    def average(self, x: Tensor, partition: Partition, turn: int, *, scratch: bool = False) -> Tensor:  # noqa: ARG002
        """Return this agent's weighted mean (see :meth:`Communication.average`)."""
        received = self._exchange(self._pack(x, partition), partition, x.shape[:-1].numel())
        out = self.W[self.rank, self.rank] * x
        for j in self.neighbours:
            out += self.W[self.rank, j] * self._unpack(received[j], x, partition, j)
        return out

    def _pack(self, x: Tensor, partition: Partition) -> Tensor:
        if self.foreign == "float64":
            return x.contiguous()
        mine = partition.owner == self.rank
        parts = (x[..., mine], x[..., ~mine].half())
        return torch.cat([part.contiguous().flatten().view(torch.uint8) for part in parts])

    def _unpack(self, message: Tensor, like: Tensor, partition: Partition, sender: int) -> Tensor:
        if self.foreign == "float64":
            return message
        theirs = partition.owner == sender
        out = torch.empty_like(like)
        size = like[..., theirs].numel() * 8
        out[..., theirs] = message[:size].clone().view(torch.float64).view(like[..., theirs].shape)
        out[..., ~theirs] = message[size:].clone().view(torch.float16).view(like[..., ~theirs].shape).to(out.dtype)
        return out

    def _exchange(self, message: Tensor, partition: Partition, worlds: int) -> dict[int, Tensor]:
        import torch.distributed as dist

        received = {j: self._room(message, partition, j, worlds) for j in self.neighbours}
        operations = []
        for j in self.neighbours:
            operations.append(dist.P2POp(dist.isend, message, self._peers[j], group=self.group))
            operations.append(dist.P2POp(dist.irecv, received[j], self._peers[j], group=self.group))
        try:
            for request in dist.batch_isend_irecv(operations) if operations else ():
                request.wait()
        except RuntimeError as error:
            raise UnsupportedError(
                f"agent {self.rank}: a neighbour ({', '.join(map(str, self.neighbours))}) does not answer any more. "
                "Look at the last lines of the other processes, and start all of them again."
            ) from error
        self.bytes += message.numel() * message.element_size() * len(self.neighbours)
        return received

    def _room(self, message: Tensor, partition: Partition, sender: int, worlds: int) -> Tensor:
        if self.foreign == "float64":
            return torch.empty_like(message)
        own = len(partition.blocks[sender])
        return message.new_empty(worlds * (own * 8 + (partition.n - own) * 2))


def message_bytes(partition: Partition, foreign: Foreign, W: Tensor) -> int:
    """Return what all agents together send in a round.

    Example:
        >>> message_bytes(Partition.of([2, 2]), "float64", torch.full((2, 2), 0.5))
        64
    """
    links = (W > 0).sum(0) - (W.diagonal() > 0).long()
    if foreign == "float64":
        return int(links.sum()) * partition.n * 8
    sizes = partition.sizes.to(links.device)
    return int((links * (sizes * 8 + (partition.n - sizes) * 2)).sum())


def check_foreign(foreign: str) -> None:
    """Refuse an unknown way to send the blocks of others.

    Raises:
        RecipeError: It is unknown.
    """
    if foreign not in ("float64", "float16"):
        raise RecipeError(f"foreign is {foreign!r}, expected float64 or float16.")


def network(W: Any, agents: int) -> Communication:
    """Return the communication that a policy was given: itself, or weights between agents on one machine.

    Raises:
        RecipeError: It is for another number of agents.
    """
    found = W if isinstance(W, Communication) else Simulated(W)
    if found.count != agents:
        raise RecipeError(f"W is for {found.count} agents, but there are blocks of {agents}.")
    return found
