r"""Moving weights along random directions: the draws, the offset of the weights, and the pass to another offset.

The weights carry an *offset*: the directions that are added to them right now. Every pass goes from one offset to
another and may update the weights on the way, so that restoring and updating is one pass over them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.optim.zeroth_order.leaves import Chunk, Leaf, Ranks, assign_ranks, checked, collect
from modicum.optim.zeroth_order.lifts import Lift
from modicum.optim.zeroth_order.moments import ENTRYWISE, UPDATES, Knobs
from modicum.optim.zeroth_order.offsets import Key, Move, Offset
from modicum.optim.zeroth_order.restoring import Undo
from modicum.optim.zeroth_order.rounding import is_low_precision, place_noise, stochastic_round
from modicum.optim.zeroth_order.settings import Settings
from modicum.random import derive_seed, generator

ByRows: TypeAlias = Callable[[slice], Tensor]  # what to add to some rows of a matrix

BLOCK = 1 << 18  # entries of a temporary, so that a processor's cache holds the few that an update needs
KEPT = 1 << 20  # numbers of dense noise that a step keeps at most, instead of drawing them for every pass


class PerturbedOptimizer(torch.optim.Optimizer):
    """Draws directions and applies perturbations and updates in place. Base of ``ZerothOrder`` only."""

    shaped: ClassVar[bool] = False  # whether dense directions depend on what the optimizer remembers

    def __init__(self, params: Any, settings: Settings) -> None:
        self.settings = settings
        super().__init__(checked(params), {"lr": settings.lr})
        self.leaves = collect(
            self.param_groups, include=settings.include, exclude=settings.exclude, vectors=settings.vectors
        )
        self.steps = self.updates = self.age = self.epoch = self.passes = 0
        self.memory: list[Tensor] = []
        self.dense_memory: dict[str, list[Tensor]] = {}
        self.position: Tensor | None = None
        self._update, self._remembers = UPDATES[settings.update]
        self._offset: Offset = {}
        self._undo = Undo()
        self._drawn: dict[Key, Tensor] = {}
        self._kept: dict[tuple[Key, str, str, int], Tensor] = {}
        self._room = KEPT
        self._size = 0
        self._dtype, self._device = torch.float32, torch.device("cpu")
        if settings.lift is not None and settings.ranks is not None:
            self._prepare(settings.lift, settings.ranks)
        settings.check(self.leaves, type(self).__name__, shaped=self.shaped)

    def _prepare(self, lift: Lift, ranks: Ranks) -> None:
        settings = self.settings
        self._size = assign_ranks(self.leaves, lift, ranks=ranks, dense=settings.dense, scale=settings.scale)
        factored = self.factored
        if not factored:
            raise RecipeError("No matrix is left for a low-rank direction. Check include, exclude and dense.")
        if any(leaf.compute_dtype == torch.float64 for leaf in factored):
            self._dtype = torch.float64
        self._device = factored[0].local().device
        self._probe_scale, self._update_scale = self._zeros(), self._zeros()
        for leaf in factored:
            leaf.prepare(lift, seed=settings.seed, epoch=0)
            self._probe_scale[leaf.coordinates] = leaf.probe_scale
            self._update_scale[leaf.coordinates] = leaf.update_scale
        self.memory = [self._zeros() for _ in range(self._remembers)]
        if settings.adapts:
            self.position = self._zeros()

    def _zeros(self) -> Tensor:
        return torch.zeros(self._size, dtype=self._dtype, device=self._device)

    @property
    def factored(self) -> list[Leaf]:
        """The leaves with a low-rank direction."""
        return [leaf for leaf in self.leaves if leaf.rank]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse groups that come after the coordinates were laid out."""
        if hasattr(self, "leaves"):
            raise UnsupportedError("Parameter groups cannot be added later. Make a new optimizer with all of them.")
        super().add_param_group(param_group)

    def _refresh(self, lift: Lift, epoch: int) -> None:
        self.fold_()
        for leaf in self.factored:
            old = leaf.basis
            leaf.prepare(lift, seed=self.settings.seed, epoch=epoch)
            self._carry(leaf, old)
        self.age, self.epoch = 0, epoch

    def _carry(self, leaf: Leaf, _old: tuple[Tensor, ...]) -> None:
        """Bring a leaf's moments to its new factors; they start at zero unless a method overrides this."""
        for memory in self.memory:
            memory[leaf.coordinates] = 0

    def _coordinates(self, key: Key) -> Tensor:
        """The numbers drawn for a direction: one vector from the processor, the same for every device and process."""
        if key not in self._drawn:
            rng = generator(self.settings.seed, "coordinates", *key)
            drawn = torch.randn(self._size, generator=rng, dtype=self._dtype)
            self._drawn[key] = drawn.to(self._device)
        return self._drawn[key]

    def _shift(self, offset: Offset) -> Tensor:
        total = self._zeros()
        for key, amount in offset.items():
            total.add_(self._coordinates(key) * self._probe_scale, alpha=amount * self.settings.eps)
        return total

    def _transition(self, target: Offset, kappas: Tensor | None = None) -> None:
        """Bring the weights to another offset and, given ``kappas``, update them in the same pass."""
        move = Move(self._offset, target)
        if move.shift or kappas is not None:
            self.passes += 1
            if self._size:
                self._transition_factors(move, kappas)
            for leaf in self.leaves:
                if not leaf.rank:
                    self._transition_dense(leaf, move, kappas)
        self._offset = dict(target)

    def _transition_factors(self, move: Move, kappas: Tensor | None) -> None:
        shift = self._shift(move.shift)
        here, there = (self._shift(offset) if offset else None for offset in (move.here, move.there))
        entries, step = (None, None) if kappas is None else self._factor_update(kappas)
        if step is not None and self.position is not None:
            self.position += step
            return
        for leaf in self.factored:
            still = not leaf.group["lr"]  # adding zeros would turn a -0 into a 0
            change = None if entries is None or still else entries(leaf)
            if is_low_precision(leaf.param.dtype):
                change = self._lifted(leaf, step) if step is not None and not still else change
                self._rewrite_factors(leaf, move, self._lifted(leaf, here), self._lifted(leaf, there), change)
            elif change is not None:
                matrix, beside = leaf.matrix(), self._lifted(leaf, shift if move.shift else None)
                for rows in _blocks(matrix):
                    delta = change(rows)
                    matrix[rows].add_(delta if beside is None else delta.add_(beside(rows)))
            else:
                self._add_factors(leaf, shift if step is None else shift + step)

    def _factor_update(self, kappas: Tensor) -> tuple[Callable[[Leaf], ByRows] | None, Tensor | None]:
        """Return an update that is made entry by entry, or else the change of the coordinates."""
        settings = self.settings
        gradient = self._zeros()
        for query, kappa in enumerate(kappas.to(gradient)):
            gradient.addcmul_(self._coordinates((self.steps, query)), kappa / len(kappas))
        gradient.mul_(self._update_scale)
        self.age += 1
        knobs = Knobs(settings.betas, settings.adam_eps, self.age if settings.bias_correction else 0)
        if settings.entrywise:
            entry, lifted, state = ENTRYWISE[settings.update](gradient, tuple(self.memory), knobs)
            self.memory = list(state)
            return lambda leaf: _entries(leaf, entry, lifted), None
        step, state = self._update(gradient, tuple(self.memory), knobs)
        self.memory = list(state)
        change = self._zeros()
        for leaf in self.factored:
            change[leaf.coordinates] = -leaf.group["lr"] * step[leaf.coordinates]
        return None, change

    def _lifted(self, leaf: Leaf, coordinates: Tensor | None) -> ByRows | None:
        """Return the direction with these coordinates, in the precision of the computation."""
        if coordinates is None:
            return None
        left, right = leaf.factors(_known(self.settings.lift), coordinates)
        stacked = len(leaf.shape) == 3
        return lambda rows: left[rows] @ (right[rows] if stacked else right).to(left.dtype).mT

    def _add_factors(self, leaf: Leaf, coordinates: Tensor) -> None:
        """Add the direction with these coordinates to a weight of full precision."""
        left, right = leaf.factors(_known(self.settings.lift), coordinates)
        matrix = leaf.matrix()
        add = matrix.addmm_ if matrix.dim() == 2 else matrix.baddbmm_
        add(left.to(matrix.dtype), right.mT)

    def _rewrite_factors(
        self, leaf: Leaf, move: Move, here: ByRows | None, there: ByRows | None, change: ByRows | None
    ) -> None:
        matrix = leaf.matrix()
        for rows in _blocks(matrix):
            undo, step = (None if part is None else part(rows) for part in (here, change))
            redo = None if there is None else -undo if undo is not None and move.turns else there(rows)
            self._rewrite(leaf, matrix[rows], rows, undo=undo, redo=redo, step=step)

    def _rewrite(
        self, leaf: Leaf, part: Tensor, rows: slice, *, undo: Tensor | None, redo: Tensor | None, step: Tensor | None
    ) -> None:
        """Bring some rows of a 16-bit tensor from one perturbation to another, by way of the weights themselves."""
        place = (leaf.name, rows.start)
        values = part if undo is None else self._undo.restored(place, part, undo)
        if step is not None:
            values = stochastic_round(values + step, part.dtype, noise=self._noise(leaf, rows))
        if redo is not None:
            values = self._undo.perturbed(place, values, redo)
        part.copy_(values)

    def _noise(self, leaf: Leaf, rows: slice, purpose: str = "rounding") -> Tensor:
        """Draw the rounding noise of some local rows: fresh in each step, and the same however the tensor is cut."""
        local = leaf.local()
        start, stop, _ = rows.indices(len(local) if local.dim() else 1)
        key = derive_seed(self.settings.seed, purpose, self.steps, leaf.name)
        width = math.prod(local.shape[1:])
        return place_noise(key, leaf.rows().start + start, stop - start, width, device=local.device)

    def _transition_dense(self, leaf: Leaf, move: Move, kappas: Tensor | None) -> None:
        target = leaf.local()
        target = target if target.dim() else target.view(1)
        exact = is_low_precision(target.dtype)
        queries = [] if kappas is None else [(self.steps, query) for query in range(len(kappas))]
        needed = dict.fromkeys([*([*move.here, *move.there] if exact else move.shift), *queries])
        memory = self._dense_memory_of(leaf) if kappas is not None or self.shaped else []
        for chunk in leaf.chunks:
            directions = {key: self._direction(leaf, chunk, key) for key in needed}
            undo = self._mixed(directions, move.here if exact else {})
            redo = self._mixed(directions, move.there if exact else move.shift)
            step = None
            if kappas is not None:
                old = tuple(part[chunk.rows] for part in memory)
                known = [directions[key] for key in queries]
                step, new = self._dense_update(leaf, chunk, kappas.to(known[0]), known, old)
                for part, value in zip(old, new, strict=True):
                    part.copy_(value)
                step = step * -lr if (lr := leaf.group["lr"]) else None
            if exact:
                self._rewrite(leaf, target[chunk.rows], chunk.rows, undo=undo, redo=redo, step=step)
                continue
            for change in (redo, step):
                if change is not None:
                    target[chunk.rows].add_(change)

    def _mixed(self, directions: Mapping[Key, Tensor], offset: Offset) -> Tensor | None:
        """Return what an offset adds to a chunk."""
        scaled = [directions[key] * (amount * self.settings.eps) for key, amount in offset.items()]
        return torch.stack(scaled).sum(0) if len(scaled) > 1 else next(iter(scaled), None)

    def _dense_memory_of(self, leaf: Leaf) -> list[Tensor]:
        if leaf.name not in self.dense_memory:
            self.dense_memory[leaf.name] = self._fresh_dense_memory(leaf)
        return self.dense_memory[leaf.name]

    def _fresh_dense_memory(self, leaf: Leaf) -> list[Tensor]:
        return self._new_dense_memory(leaf, leaf.local().view(1) if leaf.param.dim() == 0 else leaf.local())

    def _new_dense_memory(self, leaf: Leaf, like: Tensor) -> list[Tensor]:
        return [torch.zeros_like(like, dtype=leaf.compute_dtype) for _ in range(self._remembers)]

    def _direction(self, leaf: Leaf, chunk: Chunk, key: Key) -> Tensor:
        """The part of a dense direction that belongs to a chunk."""
        return self._draw(leaf, chunk, key)

    def _draw(self, leaf: Leaf, chunk: Chunk, key: Key, *, purpose: str = "dense") -> Tensor:
        """Draw the noise of a chunk, or draw it again; small tensors keep theirs for the step."""
        name = (key, purpose, leaf.name, chunk.number)
        if (kept := self._kept.get(name)) is not None:
            return kept
        settings = self.settings
        drawn = leaf.draw(
            chunk, seed=settings.seed, step=key[0], query=key[1], purpose=purpose, how=settings.distribution
        )
        if drawn.numel() <= self._room:
            self._kept[name] = drawn
            self._room -= drawn.numel()
        return drawn

    def _forget(self) -> None:
        """Drop the draws of earlier steps."""
        self._drawn = {key: value for key, value in self._drawn.items() if key[0] >= self.steps}
        self._kept = {name: value for name, value in self._kept.items() if name[0][0] >= self.steps}
        self._room = KEPT - sum(value.numel() for value in self._kept.values())

    def _dense_update(
        self, _leaf: Leaf, _chunk: Chunk, kappas: Tensor, directions: list[Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the step on a chunk and the new moments; called before :attr:`updates` counts this step."""
        gradient = directions[0] * (kappas[0] / len(directions))
        for kappa, other in zip(kappas[1:], directions[1:]):
            gradient.addcmul_(other, kappa / len(directions))
        settings = self.settings
        knobs = Knobs(settings.betas, settings.adam_eps, self.updates + 1 if settings.bias_correction else 0)
        return self._update(gradient, state, knobs)

    def _dense_sum(self, leaf: Leaf, offset: Offset) -> Tensor:
        """A dense leaf's values at a point, for engines that do not write the weights."""
        data = leaf.local()
        total = data.to(leaf.compute_dtype).reshape(data.shape or (1,)).clone()
        for chunk in leaf.chunks:
            for key, amount in offset.items():
                total[chunk.rows].add_(self._direction(leaf, chunk, key), alpha=amount * self.settings.eps)
        return total.view(data.shape).to(data.dtype)

    def _tangents(self, key: Key) -> dict[Leaf, Tensor]:
        """The whole direction, tensor by tensor, for the exact derivative."""
        scaled = self._coordinates(key) * self._probe_scale if self._size else None
        tangents = {}
        for leaf in self.leaves:
            if leaf.rank and scaled is not None:
                left, right = leaf.factors(_known(self.settings.lift), scaled)
                tangents[leaf] = (left @ right.to(left.dtype).mT).view(leaf.param.shape).to(leaf.param.dtype)
            else:
                parts = [self._direction(leaf, chunk, key) for chunk in leaf.chunks]
                tangents[leaf] = torch.cat(parts).view(leaf.param.shape).to(leaf.param.dtype)
        return tangents

    @torch.no_grad()
    def fold_(self) -> None:
        """Write an adapter engine's learned coordinates into the weights, which then are the trained model."""
        if self.position is None or self.settings.lift is None or not self.position.any():
            return
        for leaf in self.factored:
            if leaf.stands_for_quantized:
                if self.position[leaf.coordinates].any():
                    raise UnsupportedError(f"{leaf.name} is quantized: nothing can be folded into it. Export a LoRA.")
                continue
            if is_low_precision(leaf.param.dtype):
                self._rewrite_factors(leaf, Move({}, {}), None, None, self._lifted(leaf, self.position))
            else:
                self._add_factors(leaf, self.position)
        self.position.zero_()

    @torch.no_grad()
    def discard_(self) -> None:
        """Forget the perturbation in the weights and what was learned beside them: other weights have been loaded."""
        self._offset, self._undo = {}, Undo()
        if self.position is not None:
            self.position.zero_()


def _entries(leaf: Leaf, entry: Callable[..., Tensor], parts: tuple[Tensor, ...]) -> ByRows:
    """Return a step that is made entry by entry from a leaf's factors."""
    dtype, (left, right) = leaf.compute_dtype, leaf.basis
    stacked = len(leaf.shape) == 3
    shape = (*leaf.shape[:-2], 1, leaf.rank)
    local = [part[leaf.coordinates].view(shape)[leaf.rows() if stacked else ...] for part in parts]

    def step(rows: slice) -> Tensor:
        values = [part[rows] if stacked else part for part in local]
        there = (right[rows] if stacked else right).to(dtype)
        return entry(left[rows].to(dtype), there, *values).mul_(-leaf.group["lr"])

    return step


def _blocks(matrix: Tensor) -> list[slice]:
    """Cut the first dimension so that a temporary of a block's size stays small."""
    per = max(1, BLOCK // max(1, matrix[0].numel())) if len(matrix) else 1
    return [slice(start, start + per) for start in range(0, len(matrix), per)]


def _known(lift: Lift | None) -> Lift:
    if lift is None:
        raise UnsupportedError("This method has no low-rank directions.")
    return lift
