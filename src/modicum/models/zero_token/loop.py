"""The loop: visits layer after layer, cycle after cycle, and lets tokens leave.

A token that leaves keeps its state. What the others see of it in the cycles that it did not run is decided by the cache
policy: its own last keys and values (``latest``), its last state through the layers' key and value maps
(``propagate``), the first cycle's for every token (``share_first``), or the true ones because nothing is saved
(``select``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from modicum.errors import UnsupportedError
from modicum.models.zero_token.cache import SlotLayer
from modicum.models.zero_token.config import ExitCriterion, ExitScope, ExitScore, PlainConfig
from modicum.models.zero_token.exit import (
    confidence,
    entropy_change,
    latent_change,
    layer_score,
    prediction_change,
    random_score,
    spread,
)
from modicum.models.zero_token.hosts import attention_of
from modicum.models.zero_token.schedule import Stages
from modicum.models.zero_token.visit import Visit

Entry = tuple[int, int, int]  # layer, cycle, slot


@dataclass(eq=False)
class Trace:
    """States, visits and counts that a pass records.

    Attributes:
        first: The state before the first visit.
        states: The state after each visit.
        visits: The visits made.
        cycle_states: The state after each cycle.
        cycles: Cycles that each token ran (b, t); padding leaves at the first decision.
        calls: Number of layer visits made.
        scores: Scores that were compared with the threshold at each decision (b, t).
        run: The pass itself, when it is over.
    """

    first: Tensor | None = None
    states: list[Tensor] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    cycle_states: list[Tensor] = field(default_factory=list)
    cycles: Tensor | None = None
    calls: int = 0
    scores: list[Tensor] = field(default_factory=list)
    run: LoopRun | None = None


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
        past: Number of tokens in the cache.
        predict: State to logits, for exit criteria that read the prediction.
        n_cycles: Cycles to run.
        exit: When tokens leave.
        trace: Record of the visits.
        depths: Cycles of each token (b, t), when they are imposed.
        arguments: What the host calls the layer of each slot with, after the state.
    """

    config: PlainConfig
    stages: Stages
    layers: nn.ModuleList
    rows: dict[tuple[int, int], int]
    pool: dict[str, Tensor]
    cache: Cache | None
    real: Tensor | None
    past: int
    predict: Callable[[Tensor], Tensor]
    n_cycles: int
    exit: Exit
    trace: Trace  # given, not made by default: torch.compile cannot trace a factory of classes
    depths: Tensor | None
    arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]

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
        entry: Entry,
        *,
        active: Tensor | None = None,
        previous: tuple[Tensor, Tensor] | None = None,
        only_store: bool = False,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Visit]:
        """Run one layer, on some ``rows`` of the batch or on all."""
        layer, cycle, slot = entry
        shared = self.config.cache_policy == "share_first"
        args, kwargs = self.arguments[slot]
        if rows is not None:
            args, kwargs = _of_rows((args, kwargs), rows, hidden.shape[0])
        if shared and cycle:
            slot = next(s for c in self.stages.cycles for (first, at, s) in c if first == layer and at == 0)
        visit = self.bare_visit((layer, cycle, slot))
        visit.rotary = kwargs.get("position_embeddings")
        visit.active = active
        # Under "propagate" a token that left makes keys of its last state, like the tokens that go on.
        visit.previous = None if self.config.cache_policy == "propagate" else previous
        visit.shared, visit.rows = shared, rows
        new = self.layers[layer](hidden if rows is None else hidden[rows], *args, **kwargs, visit=visit)
        if not isinstance(new, Tensor) or visit.states is None:
            why = "it computes attention by code of its own" if visit.states is None else "it returns more than a state"
            raise UnsupportedError(f"{type(self.layers[layer]).__name__} cannot be looped: {why}.")
        if torch.is_grad_enabled() and not visit.with_gradient and self.remembers:
            raise UnsupportedError(
                "Reentrant checkpointing loses the gradient of keys that a later cycle reads. "
                "Set gradient_checkpointing_kwargs to {'use_reentrant': False}."
            )
        if only_store:
            return hidden, visit
        if rows is not None:
            b, new = hidden.shape[0], hidden.index_copy(0, rows, new)
            visit.zero_attention, visit.weights = visit.whole(visit.p0, b), visit.whole(visit.weights, b)
        self.trace.calls += 1
        self.trace.visits.append(visit)
        self.trace.states.append(new)
        return new, visit

    def without_cache(self) -> LoopRun:
        """Return the same pass without its cache."""
        return replace(self, cache=None)

    def bare_visit(self, entry: Entry) -> Visit:
        """Return a visit that was not made yet."""
        layer, cycle, slot = entry
        row = self.rows.get((layer, cycle))
        return Visit(layer, cycle, slot, config=self.config, pool=self.pool, row=row, cache=self.cache)


def _of_rows(value: Any, rows: Tensor, batch: int) -> Any:
    """Return a layer's arguments for some rows of the batch; what is the same for all of them has one row, or none."""
    if isinstance(value, Tensor):
        return value[rows] if value.dim() > 1 and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _of_rows(part, rows, batch) for name, part in value.items()}
    return tuple(_of_rows(part, rows, batch) for part in value) if isinstance(value, tuple) else value


def forward(run: LoopRun, hidden: Tensor) -> Tensor:
    """Run head, loop and tail."""
    for entry in run.stages.head:
        hidden, _ = run.visit(hidden, entry)
    hidden = _loop(run, hidden)
    for entry in run.stages.tail:
        hidden, _ = run.visit(hidden, entry)
    return hidden


def run_tail(run: LoopRun, hidden: Tensor) -> Tensor:
    """Run the tail on a state that is not the last one, before the last one, and leave no trace in the cache."""
    visits, states = len(run.trace.visits), len(run.trace.states)
    for entry in run.stages.tail:
        hidden, _ = run.visit(hidden, entry)
        if run.cache is not None:
            run.cache.layers[entry[2]].crop(-hidden.shape[1])
    del run.trace.visits[visits:], run.trace.states[states:]
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
    criterion = _Criterion(run)
    done = 0
    # Cycles that cannot be told apart run as one piece, shortened to the visits asked for.
    pieces = run.stages.cycles[: run.n_cycles]
    for c, piece in enumerate(pieces):
        if len(run.stages.cycles) == 1:
            piece = tuple(entry for entry in piece if entry[1] < run.n_cycles)
        before, first = hidden, len(run.trace.visits)
        rows = _rows(run, active)
        running = None if select else active
        hidden = _hold(_embed(run, hidden, c), before, running)
        for entry in piece:
            running = None if select else active
            new, visit = run.visit(hidden, entry, active=running, previous=last.get(entry[0]), rows=rows)
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
            active = criterion.after_cycle(run.trace.visits[first:], before, hidden, active, done)
            if not select and active is not None and not bool(active.any()):
                break
    _fill(run, hidden, last, done)
    _pad_history(run, hidden)
    run.trace.cycles = cycles if len(run.stages.cycles) > 1 else cycles * run.n_cycles
    return chosen


def positions(run: LoopRun, hidden: Tensor) -> Tensor:
    """Return the position of each token, as the host gave it to the layers."""
    given = next(iter(run.arguments.values()))[1].get("position_ids")
    count = torch.arange(hidden.shape[1], device=hidden.device)[None] + run.past
    return count if given is None else given


def _hold(new: Tensor, old: Tensor, active: Tensor | None) -> Tensor:
    """Keep the old state of tokens that have left."""
    return new if active is None or new is old else torch.where(active[..., None], new, old)


def _rows(run: LoopRun, active: Tensor | None) -> Tensor | None:
    """Return the rows of the batch of which some token still runs, when others have none: only they are computed.

    Not for ``select``, which runs all, and ``propagate``, under which those that left still make keys.
    """
    if active is None or run.config.cache_policy in ("select", "propagate"):
        return None
    rows = active.any(-1).nonzero()[:, 0]
    return rows if 0 < len(rows) < len(active) else None


def _embed(run: LoopRun, hidden: Tensor, cycle: int) -> Tensor:
    if run.config.cycle_embedding == "add":
        return hidden + run.pool["cycle_embedding"][cycle]
    return hidden


def _connect(run: LoopRun, before: Tensor, after: Tensor, anchor: Tensor, cycle: int) -> Tensor:
    if run.config.cycle_embedding == "multiply":
        after = after * run.pool["cycle_embedding"][cycle]
    if run.config.loop_connection is not None:
        after = after + (anchor if run.config.loop_connection == "anchor" else before)
    if run.config.cycle_gate is not None and cycle:
        after = before + run.pool["cycle_gate"][cycle - 1] * (after - before)
    return after


def _fill(run: LoopRun, hidden: Tensor, last: dict[int, tuple[Tensor, Tensor]], done: int) -> None:
    """Give the cycles that nobody ran the keys and values that later tokens will look for."""
    if run.cache is None or run.config.cache_policy == "share_first":
        return
    missing = [entry for piece in run.stages.cycles[done:] for entry in piece]
    if len(run.stages.cycles) == 1:
        missing = [entry for entry in run.stages.cycles[0] if entry[1] >= run.n_cycles]
    for layer, cycle, slot in missing:
        if run.config.cache_policy == "propagate":
            run.visit(hidden, (layer, cycle, slot), only_store=True)
            continue
        visit = run.bare_visit((layer, cycle, slot))
        visit.rotary = run.arguments[slot][1].get("position_embeddings")
        key, value = last[layer]
        visit.store(key, value, visit.zero(attention_of(run.layers[layer]), key))


class _Criterion:
    """Decides after each cycle, or layer, who goes on."""

    def __init__(self, run: LoopRun) -> None:
        self.run, self.exit = run, run.exit
        by_layer = run.exit.criterion == "zero_attention" and run.exit.score == "layer"
        self.by_layer = run.may_exit and run.depths is None and by_layer
        self.logits: Tensor | None = None

    def after_layer(self, visit: Visit, active: Tensor | None) -> Tensor | None:
        """Let tokens leave in the middle of a cycle."""
        if visit.p0 is None:
            return active
        assert self.exit.threshold is not None  # noqa: S101 - by_layer implies it
        return self._leave(layer_score([visit.p0], score="layer"), self.exit.threshold, active, self._own_slot(visit))

    def after_cycle(
        self, visits: list[Visit], before: Tensor, after: Tensor, active: Tensor | None, done: int
    ) -> Tensor | None:
        """Let tokens leave at the end of a cycle."""
        run = self.run
        if run.depths is not None:
            return run.depths > done if active is None else active & (run.depths > done)
        if self.by_layer or self.exit.threshold is None:
            return active
        threshold = self.exit.threshold
        if self.exit.criterion == "zero_attention":
            p0s = [visit.p0 for visit in visits if visit.p0 is not None]
            if not p0s:
                raise UnsupportedError(
                    "There is no zero token to exit by. Set zero_token: true or another exit_criterion."
                )
            score = layer_score(p0s, score=self.exit.score)
        elif self.exit.criterion == "random":
            score = random_score(positions(run, after), seed=run.config.seed, cycle=done).expand(after.shape[:2])
            threshold = 1 - threshold
        elif self.exit.criterion == "confidence":
            score = confidence(run.predict(run_tail(run, after)))
        else:
            score, threshold = self._change(before, after), -threshold
        if done < self.exit.min_cycles:
            return active
        return self._leave(score, threshold, active, self._own_slot(visits[0]))

    def _own_slot(self, visit: Visit) -> int:
        """Return the slot of a visit that is its own even when the cycles share their keys."""
        return next(
            s for c in self.run.stages.cycles for (layer, at, s) in c if (layer, at) == (visit.layer, visit.cycle)
        )

    def _change(self, before: Tensor, after: Tensor) -> Tensor:
        """Return minus the change that this cycle made, so that a small change scores high."""
        if self.exit.criterion == "latent":
            return -latent_change(before, after)
        logits, previous = self.run.predict(run_tail(self.run, after)), self.logits
        self.logits = logits
        if previous is None:
            return after.new_full(after.shape[:2], -torch.inf)
        measure = entropy_change if self.exit.criterion == "entropy" else prediction_change
        return -measure(previous, logits)

    def _leave(self, score: Tensor, threshold: float, active: Tensor | None, slot: int) -> Tensor:
        stays = active if active is not None else torch.ones_like(score, dtype=torch.bool)
        if self.run.real is not None:
            stays = stays & self.run.real
        # NaN takes padding and tokens that have left out of every average.
        score = score.masked_fill(~stays, torch.nan)
        t = score.shape[1]
        if self.exit.scope == "prefix" and self.run.cache is not None:
            score = _with_history(self.run.cache, slot, score)
        pooled = spread(score, scope=self.exit.scope)[:, -t:]
        self.run.trace.scores.append(pooled)
        return stays & ~(pooled > threshold)


def _with_history(cache: Cache, slot: int, score: Tensor) -> Tensor:
    """Put the scores of earlier tokens in front, and remember these; tokens that did not run have NaN."""
    layer = cache.layers[slot]
    if not isinstance(layer, SlotLayer):
        raise UnsupportedError("The prefix scope needs a growing cache without window. Use exit_scope: token.")
    layer.scores = score if layer.scores is None else torch.cat([layer.scores, score], dim=1)
    return layer.scores


def _pad_history(run: LoopRun, hidden: Tensor) -> None:
    """Give the cycles that were not scored NaN, so that every slot has a score for every token."""
    if run.cache is None or run.exit.scope != "prefix" or not run.may_exit:
        return
    length = run.cache.layers[0].get_seq_length()
    for piece in run.stages.cycles:
        for _, _, slot in piece:
            missing = length - (0 if run.cache.layers[slot].scores is None else run.cache.layers[slot].scores.shape[1])
            if missing:
                _with_history(run.cache, slot, hidden.new_full((hidden.shape[0], missing), torch.nan))
