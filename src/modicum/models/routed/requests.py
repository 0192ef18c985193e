"""Which weights of the experts answer a request: the router's choice from its prompt, fixed until the answer ends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError, UnsupportedError
from modicum.models.routed.features import entropies, left_padded, pooled
from modicum.models.routed.working import WorkingWeights
from modicum.models.router import is_uniform, routing_weights, uncertainty
from modicum.weights.experts import ExpertSet

BATCHED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")
FIXED = "_modicum_weights"  # what a cache remembers of the weights that filled it
Groups: TypeAlias = Mapping[tuple[float, ...], list[int]]


class Routes(NamedTuple):
    """How requests are routed.

    Attributes:
        weights: Of the experts ``(n, T)``.
        uncertainty: Of the router ``(n)``, from 0 to 1; NaN where its logits are.
        distance: From the nearest task, in multiples of the farthest known; ``None`` without a gate.
        dense: Whether the dense model answers ``(n)``.
    """

    weights: Tensor
    uncertainty: Tensor
    distance: Tensor | None
    dense: Tensor


class Requests:
    """The part of :class:`~modicum.models.RoutedForCausalLM` that routes requests; its only subclass."""

    config: Any
    host: Any
    layers: Any
    device: Any
    experts: ExpertSet | None
    router: Any  # a property of the subclass: Router | None
    working: WorkingWeights | None
    _fixed: Tensor | None

    def materialise(self, weights: Sequence[float] | Tensor) -> None:
        """Write these weights of the experts into the model, until others are written.

        Args:
            weights: One for each expert, not negative, of sum 1; rounded to a thousandth. Uniform ones are the dense
                weights where these are the average.
        """
        if self.working is None:
            raise UnsupportedError("This model has no experts. Load a folder that the job route wrote.")
        self.working.set(torch.as_tensor(weights).tolist(), centred=self.config.route.centred)

    @torch.no_grad()
    def route(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Routes:
        """Return the weights of the experts for each prompt of a batch.

        Args:
            input_ids: Prompts ``(n, t)``.
            attention_mask: 1 for real tokens.
            **inputs: ``inputs_embeds`` in place of ``input_ids``.
        """
        if self.experts is None or self.router is None:
            raise UnsupportedError("This model has no router. Give weights, or build one with the job route.")
        route = self.config.route
        found = self.features(input_ids, attention_mask, **inputs)
        logits, distance = self.router.logits(found), self.router.distance(found)
        weights = routing_weights(
            logits,
            temperature=route.temperature,
            selection=route.selection,
            u_lo=route.u_lo,
            u_hi=route.u_hi,
            nucleus=route.nucleus,
            least=route.least,
            distance=distance,
        )
        doubt = uncertainty(logits, temperature=route.temperature)
        return Routes(weights, doubt, distance, is_uniform(weights) & (self.experts.about.dense == "average"))

    @torch.no_grad()
    def features(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any) -> Tensor:
        """Return what the router sees of each prompt, in float64 on the CPU ``(n, d)``."""
        route = self.config.route
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **inputs}
        if route.kind == "entropy":
            n = len(self.config.experts["names"])
            each = []
            for t in range(n):
                self.materialise([float(t == s) for s in range(n)])
                each.append(entropies(self.host, **given))
            return torch.stack(each, 1)
        if route.second_prefill and self.working is not None:
            self.working.dense()
        return pooled(self.host, self.layers[route.tap], pooling=route.pooling, **given)

    @contextmanager
    def fixed(self, weights: Sequence[float] | Tensor) -> Iterator[None]:
        """Answer every request by these weights of the experts while the block runs."""
        before, self._fixed = self._fixed, torch.as_tensor(weights, dtype=torch.float64)
        try:
            yield
        finally:
            self._fixed = before

    def requests(
        self, prompts: Sequence[Sequence[int]], *, batch_size: int = 32
    ) -> list[tuple[list[float], list[int]]]:
        """Return the weights that occur among many prompts, each with the numbers of its prompts."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found: dict[int, list[float]] = {}
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            ids, mask = left_padded([prompts[i] for i in chosen], self.device)
            weights = self._weights(ids, mask, None, None, {})
            found |= dict(zip(chosen, [[]] * len(chosen) if weights is None else weights.tolist()))
        groups = groups_of(torch.tensor([found[i] for i in range(len(prompts))], dtype=torch.float64))
        return [(list(row), sorted(numbers)) for row, numbers in sorted(groups.items(), reverse=True)]

    def _weights(
        self, ids: Tensor | None, mask: Tensor | None, weights: Any, cache: Any, inputs: Mapping[str, Any]
    ) -> Tensor | None:
        """Return the weights of each row: a cache's own, those that are given, or the router's."""
        if self.working is None:
            return None
        n = len(ids if ids is not None else inputs["inputs_embeds"])
        asked = self._fixed if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        known: Tensor | None = getattr(cache, FIXED, None)
        if known is not None and cache.get_seq_length():
            return _kept(known, asked, n)
        if asked is not None:
            return self._given(asked, n)
        if self.router is None:
            return torch.full((n, len(self.config.experts["names"])), 1.0 / len(self.config.experts["names"])).double()
        return self.route(ids, mask, **inputs).weights

    def _given(self, asked: Tensor, n: int) -> Tensor:
        """Return the weights that are asked for, a row for each of ``n`` requests.

        Raises:
            RecipeError: They are no weights of these experts, or of another number of requests.
        """
        assert self.experts is not None  # noqa: S101
        about = self.experts.about
        if asked.ndim not in (1, 2) or (asked.ndim == 2 and len(asked) not in (1, n)):
            raise RecipeError(
                f"weights are {list(asked.shape)}, expected ({len(about.names)}) for all requests or one row for each, "
                f"({n}, {len(about.names)})."
            )
        rows = asked.expand(n, -1)
        for row in groups_of(rows):
            about.coefficients(row)  # refuses what are no weights, whichever way the batch is run
        return rows


def _kept(known: Tensor, asked: Tensor | None, n: int) -> Tensor:
    """Return the weights that filled a cache, for as many rows as go on from it.

    Raises:
        RecipeError: Others are asked for, or it cannot be told which rows of a mixed batch go on.
    """
    alike = bool((known == known[0]).all())
    if asked is not None:
        same = (alike or asked.ndim == 1 or len(asked) == len(known)) and torch.allclose(
            asked, known[0] if alike and asked.ndim == 1 else known[:1] if alike else known, atol=1e-3
        )
        if not same:
            raise RecipeError(
                "weights changed within a request: its keys and values are those of other experts. Begin a new one."
            )
    if len(known) == n:
        return known
    if alike:
        return known[:1].expand(n, -1)
    if n % len(known):
        raise RecipeError(
            f"The cache was filled by {len(known)} requests of several experts, and {n} rows go on. Give one for each."
        )
    return known.repeat_interleave(n // len(known), 0)


def groups_of(weights: Tensor) -> dict[tuple[float, ...], list[int]]:
    """Return the different weights among rows, to a thousandth, each with the numbers of its rows."""
    groups: dict[tuple[float, ...], list[int]] = {}
    first: dict[tuple[float, ...], tuple[float, ...]] = {}  # rounded weights need not sum to 1: the first row stands
    for i, row in enumerate(weights.tolist()):
        key = first.setdefault(tuple(round(w, 3) for w in row), tuple(row))
        groups.setdefault(key, []).append(i)
    return groups


def rows_of(given: Mapping[str, Any], numbers: list[int], n: int) -> dict[str, Any]:
    """Return the arguments of some of ``n`` requests: their rows of what has a row for each, all else as it is."""
    rowed = {key for key in BATCHED if isinstance(given.get(key), Tensor) and len(given[key]) == n}
    return {key: value[numbers] if key in rowed else value for key, value in given.items()}
