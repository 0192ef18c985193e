"""Decides after each cycle, or layer, which tokens go on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache

from modicum.errors import UnsupportedError
from modicum.models.zero_token.cache import SlotLayer
from modicum.models.zero_token.exit import (
    confidence,
    entropy_change,
    gate_score,
    latent_change,
    layer_score,
    prediction_change,
    random_score,
    spread,
)
from modicum.models.zero_token.some import Some
from modicum.models.zero_token.visit import Visit

if TYPE_CHECKING:
    from modicum.models.zero_token.loop import LoopRun


class Criterion:
    """The exit criterion of one pass.

    Args:
        run: The pass.
    """

    def __init__(self, run: LoopRun) -> None:
        self.run, self.exit = run, run.exit
        by_layer = run.exit.criterion == "zero_attention" and run.exit.score == "layer"
        self.by_layer = run.may_exit and run.depths is None and by_layer
        self.logits: Tensor | None = None
        self.tails: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values of the tail by slot

    def after_layer(self, visit: Visit, active: Tensor | None) -> Tensor | None:
        """Let tokens leave in the middle of a cycle."""
        if visit.p0 is None:
            return active
        assert self.exit.threshold is not None  # noqa: S101 - by_layer implies it
        return self._leave(layer_score([visit.p0], score="layer"), self.exit.threshold, active, visit)

    def after_cycle(
        self, visits: list[Visit], before: Tensor, after: Tensor, active: Tensor | None, done: int, some: Some | None
    ) -> Tensor | None:
        """Let tokens leave at the end of a cycle, which ran on ``some``."""
        run = self.run
        if run.depths is not None:
            return run.depths > done if active is None else active & (run.depths > done)
        if self.by_layer or self.exit.threshold is None:
            return active
        threshold, criterion = self.exit.threshold, self.exit.criterion
        # The prediction after the cycle before is what these two compare with.
        if done < self.exit.min_cycles and criterion not in ("entropy", "kl"):
            return active
        if criterion == "zero_attention":
            p0s = [visit.p0 for visit in visits if visit.p0 is not None]
            if not p0s:
                raise UnsupportedError(
                    "There is no zero token to exit by. Set zero_token: true or another exit_criterion."
                )
            score = layer_score(p0s, score=self.exit.score)
        elif criterion == "random":
            score = random_score(_positions(run, after), seed=run.config.seed, cycle=done).expand(after.shape[:2])
            threshold = 1 - threshold
        elif criterion == "gate":
            if "exit_gate" not in run.pool:
                raise UnsupportedError("There is no trained gate to exit by. Fit one: modicum.models.fit_exit_gate.")
            score = gate_score(after, run.pool["exit_gate"][done - 1])
        elif criterion == "latent":
            score, threshold = -latent_change(before, after), -threshold
        else:
            score = self._of_prediction(after, active, some)
            threshold = threshold if criterion == "confidence" else -threshold
        if done < self.exit.min_cycles:
            return active
        return self._leave(score, threshold, active, visits[0])

    def _of_prediction(self, after: Tensor, active: Tensor | None, some: Some | None) -> Tensor:
        """Return a score that needs the prediction, of the tokens that run; a small change scores high."""
        state = self.run.tail(after, active=active, some=some, last=self.tails)
        logits = self.run.predict(state if some is None else some.take(state))
        if self.exit.criterion == "confidence":
            score = confidence(logits)
        else:
            previous = self.logits
            self.logits = logits if some is None or previous is None else some.put(logits, previous)
            if previous is None:
                return after.new_full(after.shape[:2], -torch.inf)
            measure = entropy_change if self.exit.criterion == "entropy" else prediction_change
            score = -measure(previous if some is None else some.take(previous), logits)
        return score if some is None else some.put(score, score.new_zeros(after.shape[:2]))

    def _leave(self, score: Tensor, threshold: float, active: Tensor | None, visit: Visit) -> Tensor:
        stays = active if active is not None else torch.ones_like(score, dtype=torch.bool)
        if self.run.real is not None:
            stays = stays & self.run.real
        # NaN takes padding and tokens that have left out of every average.
        score = score.masked_fill(~stays, torch.nan)
        t = score.shape[1]
        if self.exit.scope == "prefix" and self.run.cache is not None:
            # Its own slot, even where the cycles share their keys.
            score = _with_history(self.run.cache, self.run.stages.slot(visit.layer, visit.cycle), score)
        given = self.run.position_ids if score.shape[1] == t else None  # what is packed begins with an empty cache
        pooled = spread(score, scope=self.exit.scope, positions=given)[:, -t:]
        self.run.trace.scores.append(pooled)
        return stays & ~(pooled > threshold)


def _positions(run: LoopRun, hidden: Tensor) -> Tensor:
    """Return the position of each token, as the host gave it to the layers."""
    given = next(iter(run.arguments.values()))[1].get("position_ids")
    count = torch.arange(hidden.shape[1], device=hidden.device)[None] + run.past
    return count if given is None else given


def _with_history(cache: Cache, slot: int, score: Tensor) -> Tensor:
    """Put the scores of earlier tokens in front, and remember these; tokens that did not run have NaN."""
    layer = cache.layers[slot]
    if not isinstance(layer, SlotLayer):
        raise UnsupportedError("The prefix scope needs a growing cache without window. Use exit_scope: token.")
    layer.scores = score if layer.scores is None else torch.cat([layer.scores, score], dim=1)
    return layer.scores


def pad_history(run: LoopRun, hidden: Tensor) -> None:
    """Give the cycles that were not scored NaN, so that every slot has a score for every token."""
    if run.cache is None or run.exit.scope != "prefix" or not run.may_exit:
        return
    length = run.cache.layers[0].get_seq_length()
    for piece in run.stages.cycles:
        for _, _, slot in piece:
            missing = length - (0 if run.cache.layers[slot].scores is None else run.cache.layers[slot].scores.shape[1])
            if missing:
                _with_history(run.cache, slot, hidden.new_full((hidden.shape[0], missing), torch.nan))
