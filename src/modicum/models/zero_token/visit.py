"""One visit of a layer: the arguments of its attention beyond the host's own.

The host's layers run unchanged. Their attention calls the function registered here, which keeps the keys and values of
the visit in its own cache slot and adds the zero token.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import CompileableContextVar

from modicum.errors import UnsupportedError
from modicum.models.zero_token.attention import (
    Route,
    as_autocast,
    attention_with_lse,
    eager_attention,
    float_mask,
    zero_attention,
    zero_logit,
)
from modicum.models.zero_token.cache import SlotLayer
from modicum.models.zero_token.config import ZeroTokenConfig
from modicum.models.zero_token.hosts import normed_key, rotated_key
from modicum.models.zero_token.some import Some

ATTENTION = "modicum_zero_token"
Zero = tuple[Tensor | None, Tensor | None]  # key (g, k) or (b, g, t, k), and bias (h,)


class PlainConfig:
    """A live view of a configuration's own fields, whose reads bypass ``ZeroTokenConfig.__getattr__``.

    A pass reads about ten fields at every visit of every token; the Python calls would cost a small model a tenth of
    its time.
    """

    def __init__(self, config: ZeroTokenConfig) -> None:
        self.__dict__ = config.__dict__

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...


class Visit:
    """Inputs and by-products of one attention call.

    Attributes:
        layer: Physical layer.
        cycle: Cycle.
        slot: Where the cache keeps this visit.
        config: The model's configuration.
        pool: The parameters that looping added, by name.
        row: Row of the pool, or None when the visit has no zero token.
        cache: The cache, or None.
        rotary: Cosines and sines of the queries' positions, where the host has them.
        some: Which tokens the layer runs on; None for all. Only keys and values of the others are there too.
        active: Which of the new tokens run this cycle, (b, t); None for all.
        previous: Keys and values of the new tokens in the cycle before, for the tokens that do not run.
        shared: Use ``previous`` for all tokens.
        seen: All keys and values that were visible; given beforehand, when they are those of the first cycle.
        zero_attention: Attention on the zero token (b, h, t), or what computes it; see :attr:`p0`.
        weights: Attention on the real tokens, by the eager implementation.
        states: Keys and values of the new tokens as they were stored.
        with_gradient: Whether autograd recorded the call.
        calls: How often the layer called attention.
    """

    # No dataclass: sharded modules copy what is one on its way in, and what the call leaves here would be lost.
    def __init__(
        self,
        layer: int,
        cycle: int,
        slot: int,
        *,
        config: PlainConfig,
        pool: dict[str, Tensor],
        row: int | None = None,
        cache: Cache | None = None,
    ) -> None:
        self.layer, self.cycle, self.slot = layer, cycle, slot
        self.config, self.pool, self.row, self.cache = config, pool, row, cache
        self.rotary: tuple[Tensor, Tensor] | None = None
        self.some: Some | None = None
        self.active: Tensor | None = None
        self.previous: tuple[Tensor, Tensor] | None = None
        self.shared = False
        self.seen: tuple[Tensor, Tensor] | None = None
        self.zero_attention: Tensor | Callable[[], Tensor] | None = None
        self.weights: Tensor | None = None
        self.states: tuple[Tensor, Tensor] | None = None
        self.with_gradient = True
        self.calls = 0

    def whole(self, x: Tensor | None) -> Tensor | None:
        """Return ``x`` (b, h, t, …) of all tokens, zero for those that the layer did not run on."""
        if x is None or self.some is None:
            return x
        b, t = self.some.size
        return self.some.put(x, x.new_zeros(b, x.shape[1], t, *x.shape[3:]), dim=2)

    @property
    def p0(self) -> Tensor | None:
        """Attention on the zero token (b, h, t), once the call was made; decoding computes it when it is asked for."""
        if callable(self.zero_attention):
            self.zero_attention = self.zero_attention()
        return self.zero_attention

    def zero(self, attention: nn.Module, key: Tensor) -> Zero | None:
        """Return key and bias of the zero token, or None when there is none; ``key`` are the real tokens' keys.

        It is computed where it is used, inside the layer, so that a recomputed layer computes it again.
        """
        if self.row is None:
            return None
        bias = self.pool["zero_bias"][self.row] if "zero_bias" in self.pool else None
        if self.config.zero_kind == "sink":
            return None, bias
        if self.config.zero_kind == "off_by_one":
            return key.new_zeros(key.shape[1], key.shape[-1]), bias
        zero_key = self.pool["zero_key"][self.row]
        if self.config.zero_key_norm:
            zero_key = normed_key(attention, zero_key)
        if self.config.zero_key_rope == "relative":
            zero_key = rotated_key(attention, zero_key, self.rotary)
        return zero_key, bias

    def store(self, key: Tensor, value: Tensor, zero: Zero | None) -> tuple[Tensor, Tensor, bool]:
        """Store the new keys and values; return all that are visible, and whether the zero token leads them."""
        if self.previous is not None and self.shared:
            key, value = self.previous
        elif self.previous is not None and self.active is not None:
            if self.some is not None:  # those that left keep what they have
                key, value = (self.some.put(x, y, dim=2) for x, y in zip((key, value), self.previous))
            if self.some is None or self.some.places is None or self.some.active is not self.active:
                runs = self.active[:, None, :, None]
                key, value = torch.where(runs, key, self.previous[0]), torch.where(runs, value, self.previous[1])
        self.states = key, value
        keys, values, leads = self._visible(key, value, zero)
        if self.some is not None:
            keys, values = keys[self.some.rows], values[self.some.rows]
        return keys, values, leads

    def _visible(self, key: Tensor, value: Tensor, zero: Zero | None) -> tuple[Tensor, Tensor, bool]:
        if self.cache is None:
            return key, value, False
        layer = self.cache.layers[self.slot]
        if self.shared and self.cycle and self.seen is not None:
            # The first cycle has stored these tokens; a slot with a window may have forgotten some since.
            return *self.seen, False
        if not isinstance(layer, SlotLayer):
            if getattr(self.cache, "offloading", False) and not key.is_cuda:
                raise UnsupportedError(
                    f"An offloaded cache waits for a CUDA device, and the model is on {key.device}, where its keys lie "
                    "already. Leave out cache_implementation, or move the model."
                )
            self.seen = self.cache.update(key, value, self.slot)
            return *self.seen, False
        # Only a key that is the same for all queries can wait in a column, and only in a slot of its own.
        zero_key, bias = zero or (None, None)
        waits = zero_key is not None and zero_key.dim() == 2 and bias is None and not self.shared
        self.seen = layer.update(key, value, zero_key=zero_key if waits else None)
        return *self.seen, waits


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    visit: Visit | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as the host would, with the zero token of ``visit`` if it has one; return (b, t, h, k) and weights."""
    if visit is None:
        raise UnsupportedError(
            f"Layers with {type(module).__name__} cannot be looped: they do not pass on arguments that are not theirs."
        )
    visit.calls += 1
    query, key, value = as_autocast(query, key, value)
    visit.with_gradient = torch.is_grad_enabled()
    zero = visit.zero(module, key)
    key, value, leads = visit.store(key, value, zero)
    count = query.shape[2] if visit.some is None else visit.some.size[1]
    if attention_mask is None and count > 1 and not leads:
        # Without a mask these are the first tokens; behind them lies what a static cache has room for.
        key, value = key[:, :, :count], value[:, :, :count]
    backend = visit.config._attn_implementation_internal or "sdpa"
    if visit.some is not None and attention_mask is None:
        attention_mask = visit.some.causal(key.shape[2] - leads, query)
    if zero is None:
        out, visit.weights = _host_attention(backend, module)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return out, visit.weights
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} has sinks or biases of its own ({name}), which a zero token does not join. "
                "Set zero_token to false."
            )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    plain = backend == "sdpa" and query.device.type == "cpu" and not torch.is_grad_enabled()
    if leads and query.shape[2] == 1 and plain and visit.config.route in ("auto", "lse"):
        return _decode(query, key, value, attention_mask, zero[0], visit, scale), None
    if leads:
        key, value = key[:, :, 1:], value[:, :, 1:]
    is_causal = attention_mask is None and query.shape[2] > 1
    knobs: dict[str, Any] = {
        "attn_mask": attention_mask, "is_causal": is_causal, "scale": scale, "dropout": dropout
    }  # fmt: skip
    if backend == "eager":
        s0 = zero_logit(query, *zero, scale=scale)
        softcap = kwargs.get("softcap")
        out, visit.zero_attention, visit.weights = eager_attention(query, key, value, s0, softcap=softcap, **knobs)
    elif backend == "sdpa" and kwargs.get("softcap") is None:
        out, visit.zero_attention = zero_attention(
            query, key, value, zero[0], zero_bias=zero[1], route=_route(visit, zero, attention_mask, is_causal),
            return_zero_attention=True, **knobs,
        )  # fmt: skip
    else:
        what = f"attn_implementation={backend!r}" + ("" if kwargs.get("softcap") is None else " with softcap")
        raise UnsupportedError(f"{what} cannot express a zero token. Use 'sdpa' or 'eager'.")
    return out.transpose(1, 2).contiguous(), visit.weights  # as stock attention does: some hosts take a view


def _route(visit: Visit, zero: Zero, mask: Tensor | None, is_causal: bool) -> Route:
    """Return the route of the configuration; ``query_row`` fits causal calls without mask, the others take a column."""
    route: Route = visit.config.route
    if route == "query_row" and (mask is not None or not is_causal or zero[1] is not None):
        return "concat"
    return route


def _decode(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, zero_key: Tensor | None, visit: Visit, scale: float
) -> Tensor:
    """Attend from one token to a cache whose column 0 is the zero token: the stock kernel, nothing copied."""
    if mask is not None:
        mask = F.pad(float_mask(mask, query.dtype), (1, 0))
    out, lse = attention_with_lse(query, key, value, mask, is_causal=False, scale=scale)
    visit.zero_attention = lambda: torch.exp(zero_logit(query, zero_key, None, scale=scale) - lse)
    return out.transpose(1, 2)


def _host_attention(backend: str, module: nn.Module) -> Any:
    if backend == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[backend]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend)

# The visit under way in this thread: linear maps and feed-forward parts are called without the arguments that a layer
# gets. The layer's forward sets it and takes it away, also when it fails and when it is recomputed.
_UNDER_WAY = CompileableContextVar("modicum_zero_token_visit")


def within(forward: Callable[..., Any], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a layer's forward, and let linear maps and gates inside it know of which visit."""
    token = _UNDER_WAY.set(kwargs.get("visit"))
    try:
        return forward(layer, *args, **kwargs)
    finally:
        _UNDER_WAY.reset(token)


def add_lora(linear: nn.Module, key: str) -> None:
    """Add the visit's low-rank term, which the pool holds under ``key``, to the output of ``linear``."""
    linear.register_forward_hook(partial(_relax, key))


def add_gate(feed_forward: nn.Module) -> None:
    """Multiply the output of ``feed_forward`` by 1 - p0, averaged over the heads."""
    feed_forward.register_forward_hook(_gate)


def _relax(key: str, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    visit: Visit | None = _UNDER_WAY.get()
    if visit is None:
        return output
    a, b = visit.pool[f"lora.{key}:A"][visit.cycle], visit.pool[f"lora.{key}:B"][visit.cycle]
    x = inputs[0]  # the pool may be kept in more bits than the weights
    return output + (x @ a.to(x.dtype).mT) @ b.to(x.dtype).mT


def _gate(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
    visit: Visit | None = _UNDER_WAY.get()
    if visit is None or visit.row is None:
        return output
    if visit.p0 is None:
        raise UnsupportedError("ffn_gate needs layers that attend before they run their feed-forward part.")
    first = output[0] if isinstance(output, tuple) else output
    gated = first * (1 - visit.p0.mean(1)).to(first.dtype).reshape(*first.shape[:-1], 1)
    return (gated, *output[1:]) if isinstance(output, tuple) else gated
