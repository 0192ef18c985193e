r"""The step that every zeroth-order optimizer shares: draw, probe, compare, move.

A step asks for the loss at points :math:`W \pm \rho Z`, turns the difference into one number
:math:`\kappa = (\ell_+ - \ell_-)/2\rho` and moves along the same :math:`Z`. No gradient is computed, and nothing is
kept but what an update remembers. Methods differ in how :math:`Z` is made
(:mod:`~modicum.optim.zeroth_order.lifts`) and in what is made of :math:`\kappa Z`
(:mod:`~modicum.optim.zeroth_order.moments`).

Restoring the weights and updating them is one pass, and with ``passes=2`` the next step's perturbation rides along too.
Losses may be accumulated over micro-batches (:meth:`ZerothOrder.probe`) and processes; all of them see one direction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from modicum import processes
from modicum.errors import ModicumError, UnsupportedError
from modicum.optim.zeroth_order import state
from modicum.optim.zeroth_order.engines import Branch, ProbeHooks, random_states, require_deterministic
from modicum.optim.zeroth_order.forward_mode import derivative
from modicum.optim.zeroth_order.moments import spsa_coefficient
from modicum.optim.zeroth_order.offsets import Offset
from modicum.optim.zeroth_order.perturb import PerturbedOptimizer
from modicum.optim.zeroth_order.rounding import is_low_precision, stochastic_round
from modicum.optim.zeroth_order.settings import Settings

Closure: TypeAlias = Callable[[], Any]

COUNTS = ("steps", "updates", "age", "skipped", "skipped_in_a_row", "forwards")


class ZerothOrder(PerturbedOptimizer):
    """Base of the zeroth-order optimizers. A subclass chooses :class:`Settings` and may shape dense directions.

    Attributes:
        kappas: The coefficients of the last step, one for each query; a log of them can be replayed.
        position: Coordinates learned so far by an adapter engine; with the seed, all there is to keep.
        skipped: Steps whose loss was not finite.
        passes: Passes over the weights so far.
        forwards: Losses evaluated so far; a paired forward pass counts once for each point.
    """

    patience: ClassVar[int] = 10  # steps in a row with a loss that is not finite, before giving up
    replayable: ClassVar[bool] = True  # whether coefficients alone tell the update

    def __init__(self, params: Any, settings: Settings) -> None:
        super().__init__(params, settings)
        self.skipped = self.skipped_in_a_row = self.forwards = 0
        self.kappas: Tensor | None = None
        self._pending: tuple[Tensor, float] | None = None
        self._hooks: ProbeHooks | None = None
        self._attached = not any(hasattr(leaf.param, "to_local") for leaf in self.leaves)

    def attach(self, model: nn.Module) -> None:
        """Tell the optimizer whose forward passes the loss comes from; adapter engines and sharded weights need it.

        Raises:
            UnsupportedError: Dropout is active, or a module cannot carry a perturbation.
        """
        require_deterministic(model)
        self._attached = True
        if self.settings.engine == "mutate":
            sharded: Any = model
            if hasattr(sharded, "set_reshard_after_forward"):
                # FSDP2's root keeps its gathered weights for a backward pass, and would not see a perturbed shard.
                sharded.set_reshard_after_forward(True)
            return
        self._hooks = ProbeHooks(model, self.leaves, self.settings.lift, paired=self.settings.engine == "paired")
        self._show_current_point()

    def fold_(self) -> None:
        """Write an adapter engine's learned coordinates into the weights, which then are the trained model."""
        super().fold_()
        self._show_current_point()

    def detach(self) -> None:
        """Write the learned coordinates into the weights and take the hooks off the model."""
        self.fold_()
        if self._hooks is not None:
            self._hooks.remove()
            self._hooks = None

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """Probe with ``closure`` (if given), then move by everything probed since the last step.

        Args:
            closure: Returns the scalar loss of a batch; it is called several times and must see the same batch and
                draw nothing at random. With ``engine="paired"`` it returns one loss for each of :attr:`branches`.

        Returns:
            The mean probed loss, or nothing without a closure.

        Raises:
            ModicumError: The loss was not finite for :attr:`patience` steps in a row; the weights are restored.
        """
        loss = None if closure is None else self.probe(closure)
        if self._pending is None:
            raise UnsupportedError("step() has nothing to go by. Give it a closure, or call probe(closure) before.")
        sums, weight = self._pending
        losses = processes.mean(sums, weight) if self.settings.parallel == "data" else sums / weight
        kappas = self._coefficients(losses)
        if self.settings.parallel == "query":
            kappas = processes.gather(kappas)
        self._pending = None
        # The one point where the host waits for the device, after all forward passes of the step.
        if bool(torch.isfinite(kappas).all()):
            self._apply(kappas)
            self.skipped_in_a_row = 0
        else:
            self._skip(kappas)
        return loss

    @torch.no_grad()
    def probe(self, closure: Closure, *, weight: float = 1.0) -> Tensor:
        """Evaluate a (micro-)batch at this step's points and remember the losses, for :meth:`step` to use.

        Args:
            closure: See :meth:`step`.
            weight: Weight of this batch's mean loss among those of the step, such as its number of targets.

        Returns:
            The mean loss over the points.
        """
        if not self._attached:
            raise UnsupportedError(
                "The weights are sharded. Call attach(model) once, so that each pass gathers them anew."
            )
        if self._pending is None:
            self._begin()
        try:
            losses = self._losses(self._steady(closure))
        except BaseException:
            self.settle_()
            raise
        self.forwards += len(losses)
        sums, total = self._pending or (torch.zeros_like(losses), 0.0)
        self._pending = sums + losses * weight, total + weight
        return losses[-1] if self.settings.engine == "jvp" else losses.mean()

    def mean_loss(self, *, whole: bool = False) -> Tensor:
        """Return the mean loss of what was probed since the last step, 0 for nothing.

        Args:
            whole: Over all processes that share the batch; every one of them must ask.
        """
        if self._pending is None:
            return torch.zeros((), device=self.leaves[0].local().device)
        sums, weight = self._pending
        losses = processes.mean(sums, weight) if whole and self.settings.parallel == "data" else sums / weight
        return losses[-1] if self.settings.engine == "jvp" else losses.mean()

    def _steady(self, closure: Closure) -> Closure:
        """Return the closure, watched for random numbers: of two calls both must leave the streams at one place.

        A closure that sets a seed does; one with active dropout, whose two losses would differ by chance, does not.
        """
        devices = list(dict.fromkeys(leaf.local().device for leaf in self.leaves))
        seen: list[list[Tensor]] = []

        def watched() -> Any:
            value = closure()
            seen.append(random_states(devices))
            if len(seen) > 1 and not all(map(torch.equal, seen[-2], seen[-1])):
                raise UnsupportedError(
                    "The closure draws random numbers, so the two losses of a step would differ by chance. Call "
                    "model.eval() to turn off dropout, or set the seed inside the closure."
                )
            return value

        return watched

    @torch.no_grad()
    def replay(self, kappas: Sequence[Tensor]) -> None:
        """Repeat steps from their logged :attr:`kappas`, without any forward pass."""
        if not self.replayable:
            raise UnsupportedError(
                f"{type(self).__name__} cannot be replayed from its coefficients. Save the weights and the state."
            )
        for values in kappas:
            self._begin()
            if bool(torch.isfinite(values).all()):
                self._apply(values.to(self.leaves[0].local().device))
            else:
                self._skip(values)
        self.settle_()

    @torch.no_grad()
    def settle_(self) -> None:
        """Take out the perturbation that ``passes=2`` or a probe left in the weights; do so before reading them."""
        self._pending = None
        if self._offset:
            self._transition({})

    @property
    def branches(self) -> int:
        """How many losses a closure returns under ``engine="paired"``; the rows of the batch come that many times."""
        return len(self._plan())

    def _named_queries(self) -> list[int]:
        count = self.settings.queries
        first = processes.rank() * count if self.settings.parallel == "query" else 0
        return list(range(first, first + count))

    def _plan(self) -> list[Offset]:
        """The points of a step."""
        signs = (1.0, -1.0) if self.settings.sides == 2 else (1.0,)
        points: list[Offset] = [{(self.steps, query): sign} for query in self._named_queries() for sign in signs]
        return points if self.settings.sides == 2 else [{}, *points]

    def _coefficients(self, losses: Tensor) -> Tensor:
        """Turn the losses of the plan into one number for each query."""
        if self.settings.engine == "jvp":
            return losses[:-1]
        if self.settings.sides == 1:
            return (losses[1:] - losses[0]) / self.settings.eps
        return spsa_coefficient(losses[0::2], losses[1::2], eps=self.settings.eps)

    def _begin(self) -> None:
        every = self.settings.refresh_every
        # A step that failed before may have refreshed already.
        if every and self.steps // every != self.epoch and self.settings.lift is not None:
            self._refresh(self.settings.lift, self.steps // every)
        self._forget()

    def _losses(self, closure: Closure) -> Tensor:
        plan, engine = self._plan(), self.settings.engine
        if engine == "mutate":
            # After an earlier micro-batch the weights still carry the plan's last point: go through it backwards.
            order = range(len(plan)) if self._offset != plan[-1] else reversed(range(len(plan)))
            values: list[Tensor] = [torch.empty(0)] * len(plan)
            for index in order:
                if self._offset != plan[index]:
                    self._transition(plan[index])
                values[index] = _scalar(closure())
            return torch.stack(values)
        if self._hooks is None:
            raise UnsupportedError(f"engine={engine!r} works inside the model. Call attach(model) once, before step().")
        if engine == "jvp":
            tangents = [self._tangents((self.steps, query)) for query in self._named_queries()]
            pairs = [derivative(closure, self._hooks.owners, tangent) for tangent in tangents]
            return torch.stack([*(_scalar(slope) for _, slope in pairs), _scalar(pairs[0][0])])
        points = [self._branch(offset) for offset in plan]
        try:
            if engine == "paired":
                losses = self._hooks.run(points, closure)
                if not isinstance(losses, Tensor) or losses.shape != (len(plan),):
                    came = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                    raise UnsupportedError(
                        f"closure returned {came}, expected one loss for each of {len(plan)} branches."
                    )
                return losses.detach().to(torch.promote_types(losses.dtype, torch.float32))
            return torch.stack([_scalar(self._hooks.run([point], closure)) for point in points])
        finally:
            self._show_current_point()

    def _show_current_point(self) -> None:
        """Make the hooks add only the learned coordinates, no perturbation."""
        if self._hooks is not None:
            moved = self.position is not None and bool(self.position.any())
            self._hooks.current = [Branch(self.position if moved else None, {})]

    def _branch(self, offset: Offset) -> Branch:
        coordinates = self._shift(offset)
        if self.position is not None:
            coordinates = self.position + coordinates
        dense = {leaf: self._dense_sum(leaf, offset) for leaf in self.leaves if not leaf.rank}
        return Branch(coordinates, dense)

    def _apply(self, kappas: Tensor) -> None:
        self.kappas = kappas
        if self.settings.weight_decay:
            self._decay()
        self._transition(self._lookahead(), kappas)
        self.steps += 1
        self.updates += 1
        self._show_current_point()

    def _skip(self, kappas: Tensor) -> None:
        self.kappas = kappas
        self._transition({})
        self.steps += 1
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.patience:
            raise ModicumError(
                f"The loss was NaN or infinite in {self.patience} steps in a row (the weights are as before them). "
                "Lower lr or eps, or check the data."
            )

    def _lookahead(self) -> Offset:
        if self.settings.passes == 3:
            return {}
        every, upcoming = self.settings.refresh_every, self.steps + 1
        if every and upcoming % every == 0:
            return {}  # the next direction belongs to factors that do not exist yet
        return {(upcoming, query): amount for (_, query), amount in self._plan()[0].items()}

    def _decay(self) -> None:
        """Shrink matrices; norms and biases are left alone, whatever their names."""
        self._transition({})
        for leaf in self.leaves:
            kept, data = 1 - leaf.group["lr"] * self.settings.weight_decay, leaf.local()
            if leaf.param.dim() < 2:
                continue
            if not is_low_precision(data.dtype):
                data.mul_(kept)
                continue
            for chunk in leaf.chunks:  # rounded to nearest, a small decay would change nothing
                part, noise = data[chunk.rows], self._noise(leaf, chunk.rows, "decay")
                part.copy_(stochastic_round(part.float() * kept, data.dtype, noise=noise))

    def report(self) -> dict[str, int]:
        """Count what is kept and what a step costs, in numbers and in bytes.

        ``parameters`` and ``weight_bytes`` are those it moves; ``state_`` is what it remembers of the estimates,
        ``factor_`` the kept factors, ``undo_`` the most that restoring 16-bit weights took so far, ``draws_`` the
        random numbers and ``weight_passes_`` the passes of one step.
        """
        dense = sum(leaf.local().numel() for leaf in self.leaves if not leaf.rank)
        kept = [*self.memory, *(x for parts in self.dense_memory.values() for x in parts)]
        kept += [] if self.position is None else [self.position]
        queries, mutate = self.settings.queries, self.settings.engine == "mutate"
        writes = 1 if self.settings.entrywise or not self._size else 0
        return {
            "parameters": sum(leaf.local().numel() for leaf in self.leaves),
            "weight_bytes": sum(leaf.local().nbytes for leaf in self.leaves if not leaf.stands_for_quantized),
            "coordinates": self._size,
            "state_numbers": sum(x.numel() for x in kept),
            "state_bytes": sum(x.nbytes for x in kept),
            "factor_bytes": sum(f.nbytes for leaf in self.factored for f in leaf.basis),
            "undo_bytes": self._undo.peak,
            "forwards_per_step": len(self._plan()),
            "draws_per_step": queries * (self._size + dense),
            "weight_passes_per_step": len(self._plan()) + self.settings.passes - 2 if mutate else writes,
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the weights; settles the weights first."""
        self.settle_()
        mine = state.identity(self)
        mine |= {name: getattr(self, name) for name in COUNTS}
        mine |= {"epoch": self.epoch, "memory": self.memory, "position": self.position}
        mine |= {"dense_memory": self.dense_memory}
        return {**super().state_dict(), "zeroth_order": mine | self._more_state()}

    def _more_state(self) -> dict[str, Any]:
        return {}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run.

        Raises:
            CheckpointError: The state belongs to another method, variant, engine, seed or set of parameters. The
                optimizer is then as it was.
        """
        state.check(self, state_dict, counts=COUNTS)
        mine = state_dict["zeroth_order"]
        self.settle_()
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for leaf in self.leaves:  # loading replaces the groups, and with them the learning rates that leaves follow
            leaf.group = next(g for g in self.param_groups if any(p is leaf.param for p in g["params"]))
        for name in COUNTS:
            setattr(self, name, mine[name])
        self.memory = [x.to(self._device, self._dtype, copy=True) for x in mine["memory"]]
        if self.position is not None:
            self.position.copy_(mine["position"])
        self.dense_memory = {
            leaf.name: [x.to(leaf.local().device, copy=True) for x in mine["dense_memory"][leaf.name]]
            for leaf in self.leaves
            if leaf.name in mine["dense_memory"]
        }
        every, lift = self.settings.refresh_every, self.settings.lift
        if every and lift is not None:  # the factors of the last step; the next one refreshes them if it is time
            self.epoch = mine.get("epoch", max(0, self.steps - 1) // every)
            for leaf in self.factored:
                leaf.prepare(lift, seed=self.settings.seed, epoch=self.epoch)
        self._load_more_state(mine)
        self._show_current_point()

    def _load_more_state(self, state: dict[str, Any]) -> None:
        """Read back what :meth:`_more_state` wrote."""


def _scalar(loss: Any) -> Tensor:
    value = loss.detach() if isinstance(loss, Tensor) else torch.as_tensor(loss, dtype=torch.float64)
    if value.numel() != 1:
        raise UnsupportedError(f"closure returned a tensor of shape {tuple(value.shape)}, expected one scalar loss.")
    return value.reshape(()).to(torch.promote_types(value.dtype, torch.float32))
