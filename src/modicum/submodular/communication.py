"""How agents average with their neighbours: all on one machine, or each in a process of its own.

Both give the same numbers. What is sent in a round by an agent is its copy, ``n`` numbers of 8 bytes, to each
neighbour; with ``foreign="float16"`` only the agent's own block keeps 8 bytes, and what it merely passes on takes 2.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.knobs import guarded
from modicum.submodular.draws import keys, seeds_of, uniform
from modicum.submodular.graphs import check_weights
from modicum.submodular.partition import Partition
from modicum.types import NonNegativeInt, UnitInterval

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Weights: TypeAlias = Any  # a matrix, a function from the round to one, or a Communication
Foreign: TypeAlias = Literal["float64", "float16"]
SPARSE = 8  # times as many places as links, from which on a product over the links alone is faster
HINTS = 1 << 20  # more rounds than are ever played on one hint


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

    def average(self, x: Tensor, partition: Partition, turn: int, *, trial: int | None = None) -> Tensor:
        """Return each held agent's weighted mean over its neighbours and itself.

        Args:
            x: The copies that are held, (..., agents held, n).
            partition: Whose the elements are.
            turn: Number of the round.
            trial: Which of the rounds this is that are tried out on a hint, before the round itself, and then
                forgotten.
        """
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Return what must be known to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""


class Network(Communication):
    """Weights of each round: of a graph that stays or changes, with messages that arrive or are lost.

    Args:
        W: Weights, (N, N), or a function from the round to weights, for graphs that change.
        adjacency: The graph whose links alone may carry weight.
        drop: Probability that a message is lost; its receiver uses its own copy instead.
        foreign: How an agent sends the blocks of others.
        seed: Seed of the losses.
        count: How many agents there are, where it is known.

    Raises:
        RecipeError: The weights are not symmetric and doubly stochastic weights of a connected graph, or a knob is out
            of range. Graphs that change may fall apart in a round.
    """

    def __init__(
        self, W: Any, *, adjacency: Any, drop: float, foreign: Foreign, seed: int, count: int | None = None
    ) -> None:
        if not 0 <= drop <= 1:
            raise RecipeError(f"drop is {drop}, expected a probability in [0, 1].")
        check_foreign(foreign)
        self._of = W if callable(W) else None
        self.adjacency, self.drop, self.foreign = adjacency, drop, foreign
        self.W = self._checked(W(0) if callable(W) else W, count)
        self.count, self.device = len(self.W), self.W.device
        self._keys = keys(seeds_of(seed)[0], "drop", range(self.count), device=self.device)[0] if drop else None

    def _checked(self, W: Any, count: int | None) -> Tensor:
        return check_weights(W, adjacency=self.adjacency, agents=count, connected=self._of is None)

    def weights(self, turn: int, *, trial: int | None = None) -> Tensor:
        """Return the weights of a round, those of lost messages given to the receivers themselves.

        The graph is that of the round, on a hint too; what is lost is drawn for every trial anew.
        """
        if self._of is not None:
            self.W = self._checked(self._of(turn), self.count)
        if self._keys is None:
            return self.W
        draw = turn if trial is None else (turn + 1) * HINTS + trial
        lost = uniform(self._keys, draw, self.count) < self.drop
        lost.fill_diagonal_(False)
        gone = torch.where(lost, self.W, 0)
        return self.W - gone + torch.diag(gone.sum(1))


@guarded
class Simulated(Network):
    """All agents on one machine: the average is a product with ``W``.

    Args:
        W: Weights, (N, N), or a function from the round to weights, for graphs that change.
        adjacency: The graph whose links alone may carry weight.
        drop: Probability that a message is lost; its receiver uses its own copy instead.
        delay: Messages arrive so many rounds late, those of a hint too; until the first does, a receiver uses its own
            copy.
        foreign: How an agent sends the blocks of others.
        seed: Seed of the losses.

    Raises:
        RecipeError: The weights are not symmetric and doubly stochastic weights of a connected graph, or a knob is out
            of range.

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
        if delay < 0:
            raise RecipeError(f"delay is {delay}, expected at least 0 rounds.")
        super().__init__(W, adjacency=adjacency, drop=drop, foreign=foreign, seed=seed)
        self.delay = delay
        self.agents = torch.arange(self.count, device=self.device)
        self._sent: list[Tensor] = []  # the last messages, of ``delay`` + 1 rounds
        self._tried: list[Tensor] = []  # those of the present hint
        self._size: tuple[Tensor, Partition, int] | None = None
        self._thin: tuple[Tensor, Tensor] | None = None

    def _round_bytes(self, partition: Partition) -> int:
        """Return what all agents send in a round over the present weights."""
        if self._size is None or self._size[0] is not self.W or self._size[1] is not partition:
            self._size = (self.W, partition, message_bytes(partition, self.foreign, self.W))
        return self._size[2]

    def average(self, x: Tensor, partition: Partition, turn: int, *, trial: int | None = None) -> Tensor:
        """Return every agent's weighted mean (see :meth:`Communication.average`)."""
        W = self.weights(turn, trial=trial)
        self.bytes += self._round_bytes(partition) * x.shape[:-2].numel()
        if self.foreign == "float64" and not self.delay:
            return self._times(W, x)
        sent = x
        if self.foreign == "float16":
            # What belongs to the sender keeps its digits.
            mine = partition.owner == self.agents[:, None]
            sent = torch.where(mine, x, x.half().to(x.dtype))
        if self.delay:
            under_way = self._under_way(sent, trial)
            if len(under_way) <= self.delay:
                return x.clone()
            sent = under_way[-1 - self.delay]
        own = W.diagonal()
        return (W - torch.diag(own)) @ sent + own[:, None] * x

    def _times(self, W: Tensor, x: Tensor) -> Tensor:
        """Return the product, over the links alone where there are few, so that its work grows with them."""
        if W is not self.W:
            return W @ x
        if self._thin is None or self._thin[0] is not W:
            few = int((W != 0).sum()) * SPARSE <= W.numel()
            self._thin = (W, W.to_sparse() if few else W)
        thin = self._thin[1]
        if not thin.is_sparse:
            return W @ x
        found = [torch.sparse.mm(thin, part) for part in x.reshape(-1, *x.shape[-2:])]
        return found[0] if x.ndim == 2 else torch.stack(found).reshape(x.shape)

    def _under_way(self, sent: Tensor, trial: int | None) -> list[Tensor]:
        """Return all messages that are not too old, oldest first, once ``sent`` has left."""
        if trial is None:
            self._sent = [*self._sent[-self.delay :], sent]
            return self._sent
        self._tried = [*self._tried, sent] if trial else [sent]
        return [*self._sent, *self._tried]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the messages that are still under way."""
        return {"sent": torch.stack(self._sent)} if self._sent else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the messages that were under way."""
        self._sent = [*state["sent"]] if "sent" in state else []


@guarded
class PointToPoint(Network):
    """One agent in each process; messages go to neighbours alone, over ``torch.distributed``.

    Args:
        group: The processes, in the order of the agents; the default group where ``None``.
        W: Weights, (N, N), or a function from the round to weights; the same in every process.
        adjacency: The graph whose links alone may carry weight.
        drop: Probability that a message counts as lost when it arrives; its receiver uses its own copy instead.
        foreign: How an agent sends the blocks of others.
        seed: Seed of the losses, the same in every process.

    Raises:
        RecipeError: The weights are not symmetric and doubly stochastic weights of a connected graph, or for another
            number of agents.
        UnsupportedError: The processes are not connected, or a neighbour does not answer.
    """

    def __init__(
        self,
        group: ProcessGroup | None,
        W: Any,
        *,
        adjacency: Any = None,
        drop: UnitInterval = 0.0,
        foreign: Foreign = "float64",
        seed: int = 0,
    ) -> None:
        import torch.distributed as dist

        if not (dist.is_available() and dist.is_initialized()):
            raise UnsupportedError(
                "PointToPoint needs processes that are connected: start them with torchrun, and call "
                "torch.distributed.init_process_group first."
            )
        self.group = group if group is not None else dist.group.WORLD
        count = dist.get_world_size(self.group)
        super().__init__(W, adjacency=adjacency, drop=drop, foreign=foreign, seed=seed, count=count)
        self.rank = dist.get_rank(self.group)
        self.agents = torch.tensor([self.rank], device=self.device)

    @property
    def neighbours(self) -> list[int]:
        """The agents that this one exchanges messages with, by the present weights."""
        return [j for j in self.W[self.rank].nonzero().flatten().tolist() if j != self.rank]

    def average(self, x: Tensor, partition: Partition, turn: int, *, trial: int | None = None) -> Tensor:
        """Return this agent's weighted mean (see :meth:`Communication.average`)."""
        weights = self.weights(turn, trial=trial)[self.rank]
        received = self._exchange(self._pack(x, partition), partition, x.shape[:-1].numel())
        out = weights[self.rank] * x
        for j, message in received.items():
            out += weights[j] * self._unpack(message, x, partition, j)
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

        named: Any = self.group
        received = {j: self._room(message, partition, j, worlds) for j in self.neighbours}
        operations = []
        for j, room in received.items():
            peer = dist.get_global_rank(named, j)
            operations.append(dist.P2POp(dist.isend, message, peer, group=self.group))
            operations.append(dist.P2POp(dist.irecv, room, peer, group=self.group))
        try:
            for request in dist.batch_isend_irecv(operations) if operations else ():
                request.wait()
        except RuntimeError as error:
            raise UnsupportedError(
                f"agent {self.rank}: a neighbour ({', '.join(map(str, received))}) does not answer any more. "
                "Look at the last lines of the other processes, and start all of them again."
            ) from error
        self.bytes += message.numel() * message.element_size() * len(received)
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
