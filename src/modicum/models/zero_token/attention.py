r"""Attention with a zero token: one more key in every call, trainable, with value zero.

.. math::
    s_0 = \frac{q \cdot k_0}{\sqrt d} + b_0, \qquad
    p_0 = \sigma(s_0 - \mathrm{lse}), \qquad
    o = \sigma(\mathrm{lse} - s_0)\, o_{\mathrm{standard}}, \qquad
    \mathrm{lse} = \log \textstyle\sum_j e^{s_j}

so that the zero token is a learned, input-dependent gate on each head's output. With :math:`k_0 = 0` it is
softmax-off-by-one, with :math:`k_0 = 0` and a bias per head the attention sink of gpt-oss.

Shapes: ``b`` batch, ``h`` query heads, ``g`` key-value heads, ``t`` queries, ``s`` keys, ``k`` head width.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from modicum.errors import UnsupportedError, did_you_mean
from modicum.types import Positive, UnitInterval

Route: TypeAlias = Literal["auto", "concat", "query_row", "lse", "eager"]
Mask: TypeAlias = Bool[Tensor, "#b #h t s"] | Float[Tensor, "#b #h t s"]

# Private operators: they are what scaled_dot_product_attention runs on a CPU, and they also give the log-sum-exp.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_PADDING = 8  # flash kernels want head widths in multiples of eight


def zero_attention(
    query: Float[Tensor, "b h t k"],
    key: Float[Tensor, "b g s k"],
    value: Float[Tensor, "b g s k"],
    zero_key: Float[Tensor, "g k"] | Float[Tensor, "#b g t k"] | None,
    *,
    zero_bias: Float[Tensor, " h"] | None = None,
    attn_mask: Mask | None = None,
    is_causal: bool = False,
    scale: Positive | None = None,
    dropout: UnitInterval = 0.0,
    route: Route = "auto",
    return_zero_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attend to the keys and to one zero token.

    Args:
        query: Queries.
        key: Keys of the real tokens; the zero token is not among them.
        value: Values of the real tokens.
        zero_key: Key of the zero token, one for each key-value head, or one for each query position as well; ``None``
            without ``zero_bias`` is standard attention.
        zero_bias: Added to the zero token's logit, one for each query head; without ``zero_key`` it is that logit.
        attn_mask: What each query may see of the real keys, boolean or additive. The zero token is always visible.
        is_causal: Query i sees keys 0 to i; there must be as many keys as queries.
        scale: Factor on the logits; 1/sqrt(k) when not given.
        dropout: Share of attention weights that are dropped.
        route: How to compute it; all agree. ``"concat"`` puts the zero token in column 0 and runs the stock kernel,
            ``"query_row"`` adds a query as well so that the causal kernel fits, ``"lse"`` gates the stock kernel's
            output by its log-sum-exp (CPU), ``"eager"`` writes the weights out. ``"auto"`` is the cheapest that fits.
        return_zero_attention: Return :math:`p_0`, the weight on the zero token, as well; it carries gradient.

    Returns:
        The output (b, h, t, k), or the output and :math:`p_0` (b, h, t) in float32 or wider. A query that sees no real
        key gets exactly zero.

    Raises:
        UnsupportedError: The route cannot express the request.

    Example:
        >>> q = k = torch.zeros(1, 1, 2, 4)
        >>> zero_attention(q, k, torch.ones(1, 1, 2, 4), torch.zeros(1, 4), is_causal=True)[0, 0, :, 0]
        tensor([0.5000, 0.6667])
    """
    if zero_key is None and zero_bias is None:
        if return_zero_attention:
            raise UnsupportedError("There is no zero token, so no attention on it. Give zero_key or zero_bias.")
        return standard_attention(
            query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, dropout=dropout
        )
    _check(query, key, attn_mask, is_causal=is_causal)
    query, key, value = as_autocast(query, key, value)
    if route == "auto":
        route = choose_route(query, zero_key, dropout=dropout, return_zero_attention=return_zero_attention)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    knobs: dict[str, Any] = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    if route == "lse":
        if dropout:
            raise UnsupportedError("The lse route has no dropout. Use route='concat', or set attention dropout to 0.")
        out, p0 = gate_by_lse(query, key, value, zero_logit(query, zero_key, zero_bias, scale=scale), **knobs)
    elif route == "eager":
        s0 = zero_logit(query, zero_key, zero_bias, scale=scale)
        out, p0, _ = eager_attention(query, key, value, s0, dropout=dropout, **knobs)
    elif route in ("concat", "query_row"):
        prepend = _concat if route == "concat" else _query_row
        out, p0 = prepend(query, key, value, zero_key, zero_bias, dropout, return_zero_attention, **knobs)
    else:
        raise UnsupportedError(f"There is no route {route!r}. {did_you_mean(route, get_args(Route))}")
    return (out, p0) if return_zero_attention else out


def as_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the dtype that autocast would give the stock kernel, which ours stand in for."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def exact(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which autocast rounds no statistics of attention."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def choose_route(
    query: Tensor, zero_key: Tensor | None, *, dropout: float, return_zero_attention: bool
) -> Literal["concat", "lse", "eager"]:
    """Return the cheapest route for a call: one kernel and a gate on a CPU, one more column elsewhere."""
    constant = zero_key is not None and zero_key.dim() == 2
    if not dropout and query.device.type == "cpu":
        return "lse"
    # The other kernels drop the zero token's weight too, so that it could not be read off their output.
    return "concat" if constant and not (dropout and return_zero_attention) else "eager"


def _check(query: Tensor, key: Tensor, attn_mask: Tensor | None, *, is_causal: bool) -> None:
    t, s = query.shape[-2], key.shape[-2]
    if is_causal and attn_mask is not None:
        raise UnsupportedError("is_causal and attn_mask came together. Put causality into the mask.")
    if is_causal and t != s:
        raise UnsupportedError(
            f"is_causal=True with {t} queries and {s} keys would align them at the wrong corner. "
            "Leave the zero token out of key, and pass attn_mask when there are cached keys."
        )
    if attn_mask is not None and attn_mask.shape[-1] != s:
        raise UnsupportedError(
            f"attn_mask has {attn_mask.shape[-1]} columns for {s} keys. "
            "Leave the zero token out of it: it is visible to every query, whatever the window."
        )


def standard_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend without a zero token, by the stock kernel."""
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout, is_causal, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def zero_logit(
    query: Float[Tensor, "b h t k"],
    zero_key: Float[Tensor, "g k"] | Float[Tensor, "#b g t k"] | None,
    zero_bias: Float[Tensor, " h"] | None,
    *,
    scale: Positive,
) -> Float[Tensor, "b h t"]:
    """Return the zero token's logit for every query, in float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    b, h, t, k = query.shape
    if zero_key is None:
        logit = query.new_zeros((b, h, t), dtype=wide)
    else:
        groups = zero_key.shape[-3] if zero_key.dim() == 4 else zero_key.shape[0]
        grouped, wide_key = query.to(wide).view(b, groups, h // groups, t, k), zero_key.to(wide)
        with exact(query):
            if zero_key.dim() == 2:
                logit = (grouped @ wide_key[:, None, :, None]).reshape(b, h, t) * scale
            else:
                logit = (grouped * wide_key[..., None, :, :]).sum(-1).reshape(b, h, t) * scale
    return logit if zero_bias is None else _no_infinity(logit + zero_bias.to(wide)[:, None])


def _no_infinity(logit: Tensor) -> Tensor:
    """Replace a logit of plus infinity by the largest number: the same weights, and no NaN on the way to them."""
    return logit.clamp(max=torch.finfo(logit.dtype).max)


def float_mask(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as what is added to the logits."""
    if attn_mask.dtype != torch.bool:
        return attn_mask.to(dtype)
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(~attn_mask, -torch.inf)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend by the stock CPU kernel; return its output and log-sum-exp."""
    out, lse = _FLASH(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)
    if attn_mask is not None:
        # For a row without any key the kernel reports 0, which would look like one key with logit 0. The lowest finite
        # number stands for -inf, because a zero token that is switched off has logit -inf as well.
        lse = lse.masked_fill((attn_mask == -torch.inf).all(-1), torch.finfo(lse.dtype).min)
    return out, lse


class _GateByLse(torch.autograd.Function):
    """The stock kernel and a gate, with the exact gradient from the stock backward kernel.

    The backward kernel needs only (out, lse) to rebuild its softmax. Given the gated output and
    log(exp(lse) + exp(s0)) instead, it rebuilds the softmax *with* the zero token, and what it returns for the real
    tokens is their exact gradient. The zero token's own gradient is -p0 * rowsum(grad * out).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        s0: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        out, lse = attention_with_lse(query, key, value, attn_mask, is_causal=is_causal, scale=scale)
        p0 = torch.sigmoid(s0 - lse)
        # The kernel's output is ours alone: the gate goes into it.
        out = out.mul_(torch.sigmoid(lse - s0).to(out.dtype)[..., None])
        ctx.save_for_backward(query, key, value, out, torch.logaddexp(lse, s0), p0, attn_mask)
        ctx.is_causal, ctx.scale = is_causal, scale
        ctx.set_materialize_grads(False)
        return out, p0

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_p0: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, p0, attn_mask = ctx.saved_tensors
        if grad is None and grad_p0 is None:
            return (None,) * 7
        grad = torch.zeros_like(out) if grad is None else grad
        k, rows = out.shape[-1], (grad * out).sum(-1, dtype=p0.dtype)
        if grad_p0 is not None:
            # The softmax's gradient subtracts from every logit's what the weights lose on average: rows, and p0 times
            # its own gradient. The kernel sums grad * out over the head, so that the latter waits in a further column.
            rows = rows + p0 * grad_p0
            query, key, value = (F.pad(x, (0, _PADDING)) for x in (query, key, value))
            grad, out = F.pad(grad, (0, _PADDING)), F.pad(out, (0, _PADDING))
            grad[..., k], out[..., k] = 1, (p0 * grad_p0).to(out.dtype)
        grads = _FLASH_BACKWARD(
            grad, query, key, value, out, lse, 0.0, ctx.is_causal, attn_mask=attn_mask, scale=ctx.scale
        )
        grad_s0 = p0 * ((0 if grad_p0 is None else grad_p0) - rows)
        return *(x[..., :k] for x in grads), grad_s0, None, None, None


def gate_by_lse(
    query: Float[Tensor, "b h t k"],
    key: Float[Tensor, "b g s k"],
    value: Float[Tensor, "b g s k"],
    s0: Float[Tensor, "b h t"],
    *,
    attn_mask: Mask | None,
    is_causal: bool,
    scale: Positive,
) -> tuple[Tensor, Tensor]:
    """Attend by the stock kernel and gate its output by sigmoid(lse - s0); return the output and p0."""
    if query.device.type != "cpu":
        raise UnsupportedError(f"The lse route runs on a CPU, not on {query.device.type}. Use route='concat'.")
    mask = None if attn_mask is None else float_mask(attn_mask, query.dtype)
    out, p0 = _GateByLse.apply(query, key, value, s0, mask, is_causal, scale)  # type: ignore[no-untyped-call]
    return out, p0


def eager_attention(
    query: Float[Tensor, "b h t k"],
    key: Float[Tensor, "b g s k"],
    value: Float[Tensor, "b g s k"],
    s0: Float[Tensor, "b h t"],
    *,
    attn_mask: Mask | None,
    is_causal: bool,
    scale: Positive,
    dropout: UnitInterval = 0.0,
    softcap: Positive | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write the softmax out; return the output, p0, and the weights (b, h, t, s) on the real keys.

    With ``softcap`` all logits, the zero token's too, are bent to lie within plus and minus it.
    """
    repeats = query.shape[1] // key.shape[1]
    keys, values = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    with exact(query):
        logits = (query.to(s0.dtype) @ keys.to(s0.dtype).mT) * scale
        if softcap is not None:
            logits, s0 = softcap * torch.tanh(logits / softcap), softcap * torch.tanh(s0 / softcap)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            logits = logits + float_mask(attn_mask, s0.dtype)
        logits = torch.cat([s0[..., None], logits], -1)
        nothing = logits.amax(-1, keepdim=True) == -torch.inf  # no key to see, and the zero token is switched off
        weights = logits.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)
        p0, weights = weights[..., 0], F.dropout(weights[..., 1:], dropout, training=dropout > 0)
        return (weights @ values.to(s0.dtype)).to(query.dtype), p0, weights


def _concat(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    zero_key: Tensor | None,
    zero_bias: Tensor | None,
    dropout: float,
    return_zero_attention: bool,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    constant_key = _constant(zero_key, key, "concat")
    t, s, k = query.shape[-2], key.shape[-2], query.shape[-1]
    keys, values = F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))
    keys[:, :, 0] = constant_key
    mask: Any = None
    if is_causal:
        mask = causal_lower_right(t, s + 1) if zero_bias is None else query.new_ones((t, s + 1)).tril(1).bool()
    elif attn_mask is not None:
        mask = F.pad(attn_mask, (1, 0), value=attn_mask.dtype == torch.bool)
    if zero_bias is not None:
        column = F.pad(_no_infinity(zero_bias.to(query.dtype))[:, None, None], (0, s))
        mask = column.expand(-1, t, -1)[None] + (0 if mask is None else float_mask(mask, query.dtype))
    if return_zero_attention:
        query, keys, values = _with_p0_column(query, keys, values, dropout)
    out = standard_attention(query, keys, values, attn_mask=mask, is_causal=False, scale=scale, dropout=dropout)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out[..., :k], out[..., k:].sum(-1, dtype=wide)


def _query_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    zero_key: Tensor | None,
    zero_bias: Tensor | None,
    dropout: float,
    return_zero_attention: bool,
    *,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if not is_causal or attn_mask is not None or zero_bias is not None:
        raise UnsupportedError("The query_row route does causal attention by a key alone. Use route='concat'.")
    k = query.shape[-1]
    keys, values = F.pad(key, (0, 0, 1, 0)), F.pad(value, (0, 0, 1, 0))
    keys[:, :, 0] = _constant(zero_key, key, "query_row")
    row = F.pad(query, (0, 0, 1, 0))
    if return_zero_attention:
        row, keys, values = _with_p0_column(row, keys, values, dropout)
    out = standard_attention(row, keys, values, attn_mask=None, is_causal=True, scale=scale, dropout=dropout)
    wide = torch.promote_types(query.dtype, torch.float32)
    return out[:, :, 1:, :k], out[:, :, 1:, k:].sum(-1, dtype=wide)


def _with_p0_column(query: Tensor, keys: Tensor, values: Tensor, dropout: float) -> tuple[Tensor, Tensor, Tensor]:
    """Add a column to the values that is 1 for the zero token alone: it comes out of the kernel as p0."""
    if dropout:
        raise UnsupportedError("Dropout hides the attention on the zero token. Use route='eager'.")
    query, keys, values = (F.pad(x, (0, _PADDING)) for x in (query, keys, values))
    values[:, :, 0, -_PADDING] = 1
    return query, keys, values


def _constant(zero_key: Tensor | None, key: Tensor, route: str) -> Tensor:
    if zero_key is None:
        return key.new_zeros((key.shape[1], key.shape[-1]))
    if zero_key.dim() != 2:
        raise UnsupportedError(f"The {route} route needs one zero key for all queries. Use route='lse' or 'eager'.")
    return zero_key.to(key.dtype)
