r"""Policies whose agents hold a copy of everybody's probabilities and average it with their neighbours.

A round is, for all agents at once: average the copies, estimate the gradient of a surrogate for the own block, take a
step on the own block, keep the average on the others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import fields_of, guarded
from modicum.submodular.communication import HINTS, Weights, network
from modicum.submodular.draws import seeds_of, several
from modicum.submodular.functions.base import Objective
from modicum.submodular.geometry import sample_actions
from modicum.submodular.partition import Blocks, Partition
from modicum.submodular.policies.base import Policy
from modicum.types import PositiveInt, UnitInterval


@guarded
@dataclass(frozen=True)
class Settings:
    """Settings of a gossiping policy.

    Attributes:
        eta: The step; one for each world where several are given.
        c: Curvature in the surrogate's weight; any value from the true curvature on is valid, 1 always.
        gradient: ``sample`` from gains, or ``exact`` where the objective has a closed form.
        surrogate: Off, the plain multilinear extension is climbed, as an ablation.
        n_samples: How many samples are averaged.
        stratified: Spread the samples' scales evenly.
        init: ``own`` starts an agent uniform on its own block and at 0 on others, ``all`` uniform on all.
        consensus: ``paper`` averages whole copies; ``owner`` leaves each agent its own block as it is.
        grad_at: Take the gradient at the copy (``x``) or at its average (``y``).
        residual: What is done with an own block's missing mass: ``renormalise`` it, or ``idle`` with it.
        seed: Seed of all draws; several for as many worlds.
    """

    eta: float | tuple[float, ...]
    c: float = 1.0
    gradient: Literal["sample", "exact"] = "sample"
    surrogate: bool = True
    n_samples: int = 1
    stratified: bool = False
    init: Literal["own", "all"] = "own"
    consensus: Literal["paper", "owner"] = "paper"
    grad_at: Literal["x", "y"] = "x"
    residual: Literal["renormalise", "idle"] = "renormalise"
    seed: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "eta", several(self.eta))
        if isinstance(self.eta, tuple) and seeds_of(self.seed)[1] != (len(self.eta),):
            raise RecipeError(f"eta has {len(self.eta)} steps, which needs as many seeds, one for each world.")


@fields_of(Settings)
class Common(TypedDict, total=False):
    """What all gossiping policies take."""

    gradient: Literal["sample", "exact"]
    init: Literal["own", "all"]
    consensus: Literal["paper", "owner"]
    residual: Literal["renormalise", "idle"]
    seed: int | Sequence[int]


@fields_of(Settings)
class Shared(Common, total=False):
    """What the policies on the multilinear extension take."""

    c: UnitInterval
    surrogate: bool
    n_samples: PositiveInt
    stratified: bool
    grad_at: Literal["x", "y"]


class Gossip(Policy):
    """A policy whose agents average their copies.

    Args:
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        W: Weights of the averages, (N, N), a function from the round to weights, or a
            :class:`~modicum.submodular.communication.Communication`.
        settings: The knobs.
    """

    passing: ClassVar[frozenset[str]] = frozenset({"network.sent"})

    def __init__(self, blocks: Blocks, W: Weights, settings: Settings) -> None:
        self.settings = settings
        self.communication = network(W, Partition.of(blocks).agents)
        device = self.communication.device
        super().__init__(blocks, seed=settings.seed, agents=self.communication.agents, device=device)
        eta = settings.eta
        self._eta: Any = (
            torch.tensor(eta, dtype=torch.float64, device=device)[:, None, None] if isinstance(eta, tuple) else eta
        )
        self._x = self._start()

    def _start(self) -> Tensor:
        share = torch.empty(self.n, dtype=torch.float64, device=self.device)
        share[self.partition.order] = (1 / self.partition.sizes.double()).repeat_interleave(self.partition.sizes)
        self._uniform_share = share
        x = share.expand(len(self.agents), -1)
        if self.settings.init == "own":
            x = torch.where(self.partition.owner == self.agents[:, None], x, 0)
        return x.expand(*self.worlds, *x.shape).clone()

    @property
    def x(self) -> Tensor:
        """Probabilities: row i is agent i's copy, (worlds, N, n); may be assigned."""
        return self._x

    @x.setter
    def x(self, value: Any) -> None:
        found = torch.as_tensor(value).to(self.device, torch.float64)
        if found.shape != self._x.shape:
            raise RecipeError(f"x has shape {tuple(found.shape)}, expected {tuple(self._x.shape)}.")
        if not bool(((found >= 0) & (found <= 1 + 1e-9)).all()):
            raise RecipeError("x holds a number outside [0, 1], expected probabilities.")
        self._x = found.clone()

    # -- the round -----------------------------------------------------------------------------------------------

    def _round(self, x: Tensor, f: Objective, turn: int, *, trial: int | None = None) -> Tensor:
        message = self._message(x)
        y = self.communication.average(message, self.partition, turn, trial=trial)
        own = self.partition.own(message if self.settings.consensus == "owner" else y, self._rows)
        point = x if self.settings.grad_at == "x" else y
        draw, purpose = (turn, "update") if trial is None else (turn * HINTS + trial, "hint")
        gradient = self._gradient(f, point, draw, purpose)
        return self.partition.put(y, self._step(own, gradient), self._rows)

    @property
    def _rows(self) -> Tensor | None:
        return None if self._all else self.agents

    def _message(self, x: Tensor) -> Tensor:
        return x

    def _gradient(self, f: Objective, point: Tensor, turn: int, purpose: str) -> Tensor:
        """Return each held agent's gradient on its own block, (worlds, held, widest)."""
        raise NotImplementedError

    def _step(self, own: Tensor, gradient: Tensor) -> Tensor:
        """Return each own block after the step."""
        raise NotImplementedError

    def _moved(self, own: Tensor, gradient: Tensor) -> Tensor:
        """Return own blocks a step up the gradient, with places that hold no action out of the way."""
        eta = self._eta
        moved = own + eta * gradient if isinstance(eta, Tensor) else own.add(gradient, alpha=eta)
        return moved if self.partition.even else torch.where(self._valid, moved, -1)

    # -- the protocol --------------------------------------------------------------------------------------------

    def _choose(self, hint: Objective | None, rounds: int) -> Tensor:
        x = self._x
        if hint is not None:
            for number in range(rounds):
                x = self._round(x, hint, self.acts, trial=number)
        u = self._uniform("act", self.acts, 1)
        own = self.partition.own(x, self._rows)
        steps = own.cumsum(-1)
        if self.settings.residual == "idle":
            place = torch.searchsorted(steps, u, right=True)[..., 0]
            return torch.where(place < steps.shape[-1], place, -1)
        # A number below 1 of 53 bits times the mass stays below it: the place is that of a positive probability.
        place = torch.searchsorted(steps, u * steps[..., -1:], right=True)[..., 0]
        if int(place.max()) == steps.shape[-1]:  # a block without mass
            return sample_actions(self._shares(x), u[..., 0])
        return place

    def _learn(self, f: Objective) -> None:
        self._x = self._round(self._x, f, self.updates)

    def _shares(self, x: Tensor | None = None) -> Tensor:
        own = self.partition.own(self._x if x is None else x, self._rows)
        if self.settings.residual == "idle":
            return own
        mass = own.sum(-1, keepdim=True)
        # A block without mass says nothing: any action is better than none, and none is better than another.
        return torch.where(mass > 0, own / torch.where(mass > 0, mass, 1), self._uniform_choice)

    def _state(self) -> dict[str, Tensor]:
        return {"x": self._x, **{f"network.{k}": v for k, v in self.communication.state_dict().items()}}

    def _load(self, state: dict[str, Tensor]) -> None:
        self._x = state["x"].to(self.device, torch.float64).clone()
        inner = {name.removeprefix("network."): part for name, part in state.items() if name.startswith("network.")}
        self.communication.load_state_dict(inner)
