"""What the lowest blocks of a model make of pairs of answers, kept for every model that is the same up to there.

Experts whose adapters leave the lower blocks alone, mixtures of their data and merges of them differ in the upper
blocks and in nothing else. The states between the two are computed once for each pair in a process, and whatever asks
again, in training or evaluation, begins there. Models share states where the bytes of all their other tensors are
equal, which is compared, not assumed. Each pair goes through the lower blocks by itself, so that no number depends on
what was asked before.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from modicum.errors import UnsupportedError, first_line
from modicum.jobs.data.pairs import Alternatives, Lower, Pair, PairCollator
from modicum.jobs.training.objective import LabelHead
from modicum.jobs.training.partial_passes import base_of, blocks_of, is_above, states_below
from modicum.jobs.training.references import fingerprint, key_of, token_log_probabilities
from modicum.shortage import pass_on

MOST = 1 << 30  # bytes of states that a process keeps
EXACT = 1e-5  # how far a token's log-probability may move: the very same numbers go on, so they do not
P = TypeVar("P", Pair, Alternatives)


@dataclass
class Kept:
    """States of pairs; those that were not asked for longest go first.

    Args:
        most: Bytes.
    """

    most: int = MOST
    size: int = 0
    _states: OrderedDict[tuple[str, str], Tensor] = field(default_factory=OrderedDict)

    def get(self, key: tuple[str, str]) -> Tensor | None:
        """Return what is known."""
        if key in self._states:
            self._states.move_to_end(key)
        return self._states.get(key)

    def add(self, key: tuple[str, str], states: Tensor) -> None:
        """Keep states, and forget others where there is no room."""
        self._states[key] = states
        self.size += states.nbytes
        while self.size > self.most:
            self.size -= self._states.popitem(last=False)[1].nbytes


KEPT = Kept()


class LowerBlocks:
    """The lowest blocks of a model.

    Args:
        model: The model, in its adapter or not, in evaluation mode or without dropout.
        below: How many blocks; whoever trains the model must leave them alone.
        pair: With which it is tried: log-probabilities of a pass that begins above must be those of a whole pass.
        collator: Lays pairs out.
        autocast: Type in which passes are going to compute, where it is not the weights' own.
        kept: Where states are kept; with those of this process where not given.

    Raises:
        UnsupportedError: The model cannot begin there.
    """

    def __init__(
        self,
        model: Any,
        below: int,
        pair: Pair | Alternatives,
        collator: PairCollator,
        *,
        autocast: torch.dtype | None = None,
        kept: Kept | None = None,
    ) -> None:
        blocks = blocks_of(model, below)
        if any(
            "lora_" in name or "base_layer" in name for block in blocks[:below] for name, _ in block.named_modules()
        ):
            raise UnsupportedError("an adapter changes these blocks")
        base = base_of(model)
        attention = getattr(base.config, "_attn_implementation", None)
        precision = f"{model.device.type} {base.dtype} {attention} {autocast} {collator} below={below}"
        self.name = fingerprint(base, precision, without=lambda name: is_above(name, below))
        self.model, self.below, self.collator, self.autocast = model, below, collator, autocast
        self.kept = KEPT if kept is None else kept
        self._try(pair)

    def under(self, pairs: Sequence[P]) -> list[P]:
        """Return pairs with their states.

        Raises:
            UnsupportedError: There are more states than a process keeps.
        """
        if not pairs:
            return []
        sample = self._states(pairs[0])
        need = sum(map(self._tokens, {key_of(pair): pair for pair in pairs}.values())) * sample[0].nbytes
        if need > self.kept.most:
            raise UnsupportedError(
                f"states of {len(pairs)} pairs take {need / 1e9:.2f} GB, and a process keeps {self.kept.most / 1e9:.2f}"
            )
        return [replace(pair, lower=Lower(self.below, self._states(pair))) for pair in pairs]

    def _tokens(self, pair: Pair | Alternatives) -> int:
        return len(pair.prompt) * (1 if self.collator.shared else len(pair.answers)) + sum(map(len, pair.answers))

    def _states(self, pair: Pair | Alternatives) -> Tensor:
        key = self.name, key_of(pair)
        if (known := self.kept.get(key)) is not None:
            return known
        batch = self.collator([replace(pair, lower=None)])
        device = self.model.device.type
        # What is made within inference mode could never be trained on.
        with torch.inference_mode(mode=False), torch.no_grad():
            with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
                states = states_below(self.model, batch, self.below).flatten(0, 1)
            states = states[batch["spots"].to(states.device)].clone()
        self.kept.add(key, states)
        return states

    def _try(self, pair: Pair | Alternatives) -> None:
        training, head = self.model.training, LabelHead(self.model)
        self.model.eval()
        device = self.model.device.type
        try:
            with torch.no_grad(), torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
                whole, begun = (
                    token_log_probabilities(self.model, self.collator([each]))
                    for each in (replace(pair, lower=None), replace(pair, lower=Lower(self.below, self._states(pair))))
                )
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError) as error:
            pass_on(error)
            raise UnsupportedError(f"{type(error).__name__}: {first_line(error)}") from None
        finally:
            head.detach()
            self.model.train(training)
        off = float((whole - begun).abs().max())
        if not off <= EXACT:
            raise UnsupportedError(f"a token's log-probability differs by {off:.2g}")
