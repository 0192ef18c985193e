"""The loop: visits layer after layer, cycle after cycle, and lets tokens leave.

A token that leaves keeps its state. What the others see of it in the cycles that it did not run is decided by the cache
policy: its own last keys and values (``latest``), its last state through the layers' key and value maps
(``propagate``), the first cycle's for every token (``share_first``), or the true ones because nothing is saved
(``select``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from modicum.errors import UnsupportedError
from modicum.models.zero_token.cache import without_trace
from modicum.models.zero_token.config import ExitCriterion, ExitScope, ExitScore
from modicum.models.zero_token.criterion import Criterion, pad_history
from modicum.models.zero_token.hosts import attention_of
from modicum.models.zero_token.schedule import Stages
from modicum.models.zero_token.some import Some, those_running
from modicum.models.zero_token.visit import PlainConfig, Visit

Placed = tuple[int, int, int]  # layer, cycle, slot


class Trace:
    """States, visits and counts that a pass records.

    Attributes:
        first: The state before the first visit.
        states: The state after each visit.
        visits: The visits made.
        cycle_states: The state after each cycle.
        cycles: Cycles that each token ran (b, t); padding leaves at the first decision.
        calls: Number of layer visits made, those by which exits were decided among them.
        computed: Tokens of all these visits.
        scores: Scores that were compared with the threshold at each decision (b, t).
        run: The pass itself, when it is over.
    """

    # No dataclass: the compiler cannot trace its factories.
    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.states: list[Tensor] = []
        self.visits: list[Visit] = []
        self.cycle_states: list[Tensor] = []
        self.cycles: Tensor | None = None
        self.calls = self.computed = 0
        self.scores: list[Tensor] = []
        self.run: LoopRun | None = None

    def count(self, computed: Tensor) -> None:
        """Count a visit by the states (b, t, d) that it computed."""
        self.calls += 1
        self.computed += computed.shape[0] * computed.shape[1]


@dataclass(frozen=True, eq=False)
class Exit:
    """When tokens leave: the configuration's settings, or what a call asked for instead."""

    threshold: float | None
    criterion: ExitCriterion
    score: ExitScore
    scope: ExitScope
    min_cycles: int


@dataclass(frozen=True, eq=False)
class LoopRun:
    """One forward pass: the inputs that all its visits share, and the trace that they write.

    Attributes:
        config: The model's configuration.
        stages: The visits.
        layers: The host's layers.
        rows: Row of the pool by (layer, cycle).
        pool: The pool's parameters.
        cache: The cache, or None.
        real: Which tokens are no padding (b, t), or None for all.
        position_ids: Positions of the tokens, which begin anew with each text of a packed row, or None.
        past: Number of tokens in the cache.
        predict: State to logits, for exit criteria that read the prediction.
        n_cycles: Cycles to run.
        exit: When tokens leave.
        trace: Record of the visits.
        depths: Cycles of each token (b, t), when they are imposed.
        arguments: What the host calls the layer of each slot with, after the state.
        seen: Under ``share_first`` the keys and values that each layer saw in the first cycle.
    """

    config: PlainConfig
    stages: Stages
    layers: nn.ModuleList
    rows: dict[tuple[int, int], int]
    pool: dict[str, Tensor]
    cache: Cache | None
    real: Tensor | None
    position_ids: Tensor | None
    past: int
    predict: Callable[[Tensor], Tensor]
    n_cycles: int
    exit: Exit
    trace: Trace
    depths: Tensor | None
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    seen: dict[int, tuple[Tensor, Tensor]]

    @property
    def may_exit(self) -> bool:
        """Whether tokens may leave before the last cycle."""
        return (self.exit.threshold is not None or self.depths is not None) and len(self.stages.cycles) > 1

    @property
    def remembers(self) -> bool:
        """Whether a visit's keys and values are read by later ones."""
        shares = self.config.cache_policy == "share_first"
        return self.may_exit or shares or (self.cache is not None and self.n_cycles < len(self.stages.cycles))

    def visit(
        self,
        hidden: Tensor,
        entry: Placed,
        *,
        active: Tensor | None = None,
        previous: tuple[Tensor, Tensor] | None = None,
        only_store: bool = False,
        some: Some | None = None,
    ) -> tuple[Tensor, Visit]:
        """Run one layer, on some tokens or on all; ``previous`` has the keys of the others."""
        layer, cycle, slot = entry
        shared = self.config.cache_policy == "share_first"
        args, kwargs = self.arguments[slot]
        if previous is None:
            some = None  # the others have no keys of this layer yet
        if some is not None:
            args, kwargs = some.arguments((args, kwargs))
        if shared and cycle:
            slot = self.stages.slot(layer, 0)
        visit = self.bare_visit((layer, cycle, slot))
        visit.rotary = kwargs.get("position_embeddings")
        visit.active = active
        # Under "propagate" a token that left makes keys of its last state, like the tokens that go on.
        visit.previous = None if self.config.cache_policy == "propagate" else previous
        visit.shared, visit.some = shared, some
        visit.seen = self.seen.get(layer) if shared and cycle else None
        new = self.layers[layer](hidden if some is None else some.take(hidden), *args, **kwargs, visit=visit)
        if not isinstance(new, Tensor) or visit.calls != 1:
            why = "it returns more than a state" if visit.calls == 1 else f"it calls attention {visit.calls} times"
            why = why if visit.calls else "it computes attention by code of its own"
            raise UnsupportedError(f"{type(self.layers[layer]).__name__} cannot be looped: {why}.")
        if torch.is_grad_enabled() and not visit.with_gradient and self.remembers:
            raise UnsupportedError(
                "Reentrant checkpointing loses the gradient of keys that a later cycle reads. "
                "Set gradient_checkpointing_kwargs to {'use_reentrant': False}."
            )
        if shared and not cycle and visit.seen is not None:
            self.seen[layer] = visit.seen
        if only_store:
            return hidden, visit
        self.trace.count(new)
        if some is not None:
            new = some.put(new, hidden)
            visit.zero_attention, visit.weights = visit.whole(visit.p0), visit.whole(visit.weights)
        self.trace.visits.append(visit)
        self.trace.states.append(new)
        return new, visit

    @property
    def all_run(self) -> bool:
        """Whether tokens that left are computed on: for ``select``, and for ``propagate``, where they make keys."""
        return self.config.cache_policy in ("select", "propagate")

    def tail(
        self,
        hidden: Tensor,
        *,
        active: Tensor | None = None,
        some: Some | None = None,
        last: dict[int, tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Run the tail on a state that is not the last one, and leave no trace in the cache.

        Args:
            hidden: The state.
            active: Tokens whose result is wanted; None for all.
            some: These, packed.
            last: Keys and values of the tail, from the time before; they are replaced.
        """
        visits, states = len(self.trace.visits), len(self.trace.states)
        if last is None or self.config.cache_policy == "share_first":  # keys of the tail are not those of a first cycle
            last = {}
        with without_trace(self.cache, [slot for _, _, slot in self.stages.tail]):
            for entry in self.stages.tail:
                hidden, visit = self.visit(hidden, entry, active=active, previous=last.get(entry[2]), some=some)
                if visit.states is not None:
                    last[entry[2]] = visit.states
        del self.trace.visits[visits:], self.trace.states[states:]
        return hidden

    def without_cache(self) -> LoopRun:
        """Return the same pass without its cache."""
        return replace(self, cache=None)

    def bare_visit(self, entry: Placed) -> Visit:
        """Return a visit that was not made yet."""
        layer, cycle, slot = entry
        row = self.rows.get((layer, cycle))
        return Visit(layer, cycle, slot, config=self.config, pool=self.pool, row=row, cache=self.cache)


def run_visits(run: LoopRun, hidden: Tensor) -> Tensor:
    """Run head, loop and tail."""
    for entry in run.stages.head:
        hidden, _ = run.visit(hidden, entry)
    hidden = _loop(run, hidden)
    for entry in run.stages.tail:
        hidden, _ = run.visit(hidden, entry)
    return hidden


def _loop(run: LoopRun, hidden: Tensor) -> Tensor:
    config, may_exit = run.config, run.may_exit
    select = config.cache_policy == "select"
    remembers = run.remembers
    anchor = hidden
    active: Tensor | None = None  # None while nobody has left
    last: dict[int, tuple[Tensor, Tensor]] = {}  # each layer's newest keys and values of these tokens
    chosen = hidden
    cycles = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    criterion = Criterion(run)
    done = 0
    pieces = run.stages.of_cycles(run.n_cycles)
    for c, piece in enumerate(pieces):
        before, first = hidden, len(run.trace.visits)
        some = None if run.all_run else those_running(active)
        running = None if select else active
        hidden = _hold(_embed(run, hidden, c), before, running)
        for entry in piece:
            running = None if select else active
            new, visit = run.visit(hidden, entry, active=running, previous=last.get(entry[0]), some=some)
            hidden = _hold(new, hidden, running)
            if remembers and visit.states is not None and not (visit.shared and entry[0] in last):
                last[entry[0]] = visit.states
            chosen = _hold(hidden, chosen, active)
            if criterion.by_layer and c >= run.exit.min_cycles:
                active = criterion.after_layer(visit, active)
        running = None if select else active
        connected = _connect(run, before, hidden, anchor, c)
        hidden = _hold(connected, hidden, running)  # a token that left is not connected any more
        cycles = cycles + (1 if active is None else active.long())
        chosen = _hold(hidden, chosen, active)
        run.trace.cycle_states.append(hidden)
        done = c + 1
        if may_exit and done < len(pieces):
            active = criterion.after_cycle(run.trace.visits[first:], before, hidden, active, done, some)
            if not select and active is not None and not bool(active.any()):
                break
    _fill(run, hidden, last, {slot for piece in pieces[:done] for _, _, slot in piece})
    pad_history(run, hidden)
    run.trace.cycles = cycles if len(run.stages.cycles) > 1 else cycles * run.n_cycles
    return chosen


def _hold(new: Tensor, old: Tensor, active: Tensor | None) -> Tensor:
    """Keep the old state of tokens that have left."""
    return new if active is None or new is old else torch.where(active[..., None], new, old)


def _embed(run: LoopRun, hidden: Tensor, cycle: int) -> Tensor:
    if run.config.cycle_embedding == "add":
        return hidden + run.pool["cycle_embedding"][cycle].to(hidden.dtype)
    return hidden


def _connect(run: LoopRun, before: Tensor, after: Tensor, anchor: Tensor, cycle: int) -> Tensor:
    if run.config.cycle_embedding == "multiply":
        after = after * run.pool["cycle_embedding"][cycle].to(after.dtype)
    if run.config.loop_connection is not None:
        after = after + (anchor if run.config.loop_connection == "anchor" else before)
    if run.config.cycle_gate is not None and cycle:
        after = before + run.pool["cycle_gate"][cycle - 1].to(after.dtype) * (after - before)
    return after


def _fill(run: LoopRun, hidden: Tensor, last: dict[int, tuple[Tensor, Tensor]], filled: set[int]) -> None:
    """Give the slots of visits that nobody made the keys and values that later tokens will look for."""
    if run.cache is None or run.config.cache_policy == "share_first":
        return
    missing = [entry for piece in run.stages.cycles for entry in piece if entry[2] not in filled]
    for layer, cycle, slot in missing:
        if run.config.cache_policy == "propagate" or layer not in last:
            run.visit(hidden, (layer, cycle, slot), only_store=True)
            continue
        visit = run.bare_visit((layer, cycle, slot))
        visit.rotary = run.arguments[slot][1].get("position_embeddings")
        key, value = last[layer]
        visit.store(key, value, visit.zero(attention_of(run.layers[layer]), key))
