"""One visit of a layer: the arguments of its attention beyond the host's own.

The host's layers run unchanged. Their attention calls the function registered here, which keeps the keys and values of
the visit in its own cache slot and adds the zero token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modicum.errors import UnsupportedError
from modicum.models.zero_token.attention import (
    Route,
    attention_with_lse,
    eager_attention,
    float_mask,
    zero_attention,
    zero_logit,
)
from modicum.models.zero_token.cache import SlotLayer

ATTENTION = "modicum_zero_token"


@dataclass(eq=False)
class Visit:
    """Inputs and by-products of one attention call.

    Attributes:
        layer: Physical layer.
        cycle: Cycle.
        slot: Where the cache keeps this visit.
        backend: The attention implementation that the user chose.
        route: Route of the zero attention.
        cache: The cache, or None.
        has_zero: Whether there is a zero token.
        zero_key: Its key, (g, k) or (b, g, t, k).
        zero_bias: Its bias for each head.
        active: Which of the new tokens run this cycle, (b, t); None for all.
        previous: Keys and values of the new tokens in the cycle before, for the tokens that do not run.
        shared: Use ``previous`` for all tokens.
        only_store: Store keys and values, attend to nothing.
        lora: Low-rank factors by the name of the linear map.
        zero_attention: Attention on the zero token (b, h, t), or what computes it; see :attr:`p0`.
        weights: Attention on the real tokens, by the eager implementation.
        states: Keys and values of the new tokens as they were stored.
    """

    layer: int
    cycle: int
    slot: int
    backend: str = "sdpa"
    route: Route = "auto"
    cache: Cache | None = None
    has_zero: bool = False
    zero_key: Tensor | None = None
    zero_bias: Tensor | None = None
    active: Tensor | None = None
    previous: tuple[Tensor, Tensor] | None = None
    shared: bool = False
    only_store: bool = False
    lora: dict[str, tuple[Tensor, Tensor]] | None = None
    zero_attention: Tensor | Callable[[], Tensor] | None = None
    weights: Tensor | None = None
    states: tuple[Tensor, Tensor] | None = None

    @property
    def p0(self) -> Tensor | None:
        """Attention on the zero token (b, h, t), once the call was made; decoding computes it when it is asked for."""
        if callable(self.zero_attention):
            self.zero_attention = self.zero_attention()
        return self.zero_attention

    def store(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Store the new keys and values; return all that are visible, and whether the zero token leads them."""
        if self.previous is not None and self.shared:
            key, value = self.previous
        elif self.previous is not None and self.active is not None:
            runs = self.active[:, None, :, None]
            key, value = torch.where(runs, key, self.previous[0]), torch.where(runs, value, self.previous[1])
        self.states = key, value
        if self.cache is None:
            return key, value, False
        layer = self.cache.layers[self.slot]
        if self.shared and self.cycle:
            # The first cycle has stored these tokens; the other cycles read its slot.
            return layer.keys, layer.values, False
        if not isinstance(layer, SlotLayer):
            return *self.cache.update(key, value, self.slot), False
        # Only a key that is the same for all queries can wait in a column, and only in a slot of its own.
        waits = self.zero_key is not None and self.zero_key.dim() == 2 and self.zero_bias is None and not self.shared
        return *layer.update(key, value, zero_key=self.zero_key if waits else None), waits


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visit: Visit,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the host would, with the zero token of ``visit`` if it has one; return (b, t, h, k) and weights."""
    key, value, leads = visit.store(key, value)
    if visit.only_store:
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None
    if not visit.has_zero:
        out, visit.weights = _host_attention(visit.backend, module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out, visit.weights
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if leads and query.shape[2] == 1 and visit.backend == "sdpa" and query.device.type == "cpu":
        return _decode(query, key, value, attention_mask, visit, scale), None
    if leads:
        key, value = key[:, :, 1:], value[:, :, 1:]
    is_causal = attention_mask is None and query.shape[2] > 1
    if visit.backend == "eager":
        s0 = zero_logit(query, visit.zero_key, visit.zero_bias, scale=scale)
        out, visit.zero_attention, visit.weights = eager_attention(
            query, key, value, s0, attn_mask=attention_mask, is_causal=is_causal, scale=scale, dropout=dropout
        )
    elif visit.backend == "sdpa":
        result = zero_attention(
            query,
            key,
            value,
            visit.zero_key,
            zero_bias=visit.zero_bias,
            attn_mask=attention_mask,
            is_causal=is_causal,
            scale=scale,
            dropout=dropout,
            route=visit.route,
            return_zero_attention=True,
        )
        out, visit.zero_attention = result
    else:
        raise UnsupportedError(
            f"attn_implementation={visit.backend!r} cannot express a zero token. Use 'sdpa' or 'eager'."
        )
    return out.transpose(1, 2), visit.weights


def _decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, visit: Visit, scale: float) -> Tensor:
    """Attend from one token to a cache whose column 0 is the zero token: the stock kernel, nothing copied."""
    if mask is not None:
        mask = torch.nn.functional.pad(float_mask(mask, query.dtype), (1, 0))
    out, lse = attention_with_lse(query, key, value, mask, is_causal=False, scale=scale)
    visit.zero_attention = lambda: torch.exp(zero_logit(query, visit.zero_key, None, scale=scale) - lse)
    return out.transpose(1, 2)


def _host_attention(backend: str, module: nn.Module) -> Any:
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)


class Switch:
    """Tells the linear maps and the feed-forward part of a layer which visit is under way."""

    visit: Visit | None = None


def watch(attention: nn.Module) -> Switch:
    """Return a switch that follows the calls of ``attention``, those of a recomputed layer too."""
    switch = Switch()

    def remember(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        switch.visit = kwargs.get("visit")

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    return switch


def add_lora(linear: nn.Module, name: str, switch: Switch) -> None:
    """Add the visit's low-rank term to the output of ``linear``."""

    def relax(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if switch.visit is None or switch.visit.lora is None:
            return output
        a, b = switch.visit.lora[name]
        return output + (inputs[0] @ a.mT) @ b.mT

    linear.register_forward_hook(relax)


def add_gate(feed_forward: nn.Module, switch: Switch) -> None:
    """Multiply the output of ``feed_forward`` by 1 - p0, averaged over the heads."""

    def gate(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if switch.visit is None or switch.visit.p0 is None:
            return output
        return output * (1 - switch.visit.p0.mean(1))[..., None].to(output.dtype)

    feed_forward.register_forward_hook(gate)
