"""Unroll a looped model into a plain one of its host's class, which needs no code of ours.

Each visit becomes a layer of its own. The result is exact where a visit is what the host's layer is: its weights, or
its weights and a low-rank term. A zero token is one more key in every layer, with value zero; a plain checkpoint has no
place for it, but a cache has: see :func:`zero_columns`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from modicum.errors import UnsupportedError
from modicum.models.zero_token import hosts
from modicum.models.zero_token.body import Call
from modicum.models.zero_token.conversion import keep_layers
from modicum.models.zero_token.looped import Looped
from modicum.models.zero_token.schedule import VisitId
from modicum.models.zero_token.trial import result_of
from modicum.types import PositiveInt


def check_unrollable(config: Any) -> None:
    """Refuse a looped model that no plain one equals.

    Raises:
        UnsupportedError: Something between or inside the visits cannot be folded into a layer's weights.
    """
    reasons = [
        name
        for name in ("cycle_gate", "cycle_embedding", "loop_connection", "ffn_gate", "zero_bias")
        if getattr(config, name)
    ]
    if config.cache_policy == "share_first":
        reasons.append("cache_policy: share_first")
    if getattr(config.host, "scale_attn_by_inverse_layer_idx", False):
        reasons.append("attention that is scaled by the number of its layer")
    if reasons:
        raise UnsupportedError(
            f"{reasons[0]} cannot be folded into the weights of plain layers: keep the looped model."
        )
    if config.zero_token:
        _check_columns(config)


def _check_columns(config: Any) -> None:
    """Refuse zero tokens that no column of a cache can hold."""
    if any(visit not in config.rows for visit in config.schedule):
        raise UnsupportedError(
            "A column for the zero token stands in all layers or in none. Train with zero_layers: all, or unroll a "
            "model with zero_token: false."
        )
    if config.zero_kind == "sink" or config.zero_key_rope == "relative":
        raise UnsupportedError("A zero token that is no key, or turns with the query, has no place in a cache.")
    if set(config.layer_types) - {"full_attention"}:
        raise UnsupportedError(
            "A column for the zero token falls out of the window of layers that attend to near tokens alone. Keep the "
            "looped model, or train one with zero_token: false."
        )


@torch.no_grad()
def unroll(looped: Looped, *, n_cycles: PositiveInt | None = None) -> PreTrainedModel:
    """Return a plain model of the host's class with a layer for each visit.

    Args:
        looped: A looped model without zero tokens, or with them in all layers; then the plain model equals it behind
            the columns of :func:`zero_columns`.
        n_cycles: Cycles to unroll; all when not given.

    Raises:
        UnsupportedError: No plain model equals it.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from modicum.models import convert_to_zero_token
        >>> base = LlamaForCausalLM(LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=16,
        ...     num_hidden_layers=3, num_attention_heads=2))
        >>> plain = unroll(convert_to_zero_token(base, n_cycles=3, zero_token=False))
        >>> type(plain).__name__, plain.config.num_hidden_layers
        ('LlamaForCausalLM', 5)
    """
    config: Any = looped.config
    check_unrollable(config)
    schedule = unrolled_schedule(config, n_cycles)
    host = copy.deepcopy(config.host)
    host._attn_implementation_internal = config._attn_implementation
    keep_layers(host, [layer for layer, _ in schedule])
    host.dtype = looped.dtype
    with no_init_weights():
        plain: Any = hosts.host_class(host, looped.kind)(host)
    plain.to(device=looped.device, dtype=looped.dtype)
    path = hosts.layers_path(plain)
    state = {
        name: tensor for name, tensor in looped.state_dict().items() if not name.startswith(("zero_token.", f"{path}."))
    }
    for slot, visit in enumerate(schedule):
        state |= {f"{path}.{slot}.{name}": tensor for name, tensor in _layer(looped, visit).items()}
    report = plain.load_state_dict(state, strict=False)
    if report.missing_keys or report.unexpected_keys:
        raise UnsupportedError(
            f"The unrolled tensors do not fit a plain {host.model_type!r} model, whose layers depend on their number: "
            f"{', '.join((report.missing_keys + report.unexpected_keys)[:3])}. Keep the looped model, or export it "
            "with format: remote-code."
        )
    plain.tie_weights()
    result: PreTrainedModel = plain.eval()
    hold(result, looped, n_cycles=n_cycles)
    if getattr(looped, "generation_config", None) is not None:
        result.generation_config = copy.deepcopy(looped.generation_config)
    return result


@torch.no_grad()
def hold(
    plain: Any, looped: Looped, *, n_cycles: PositiveInt | None = None, columns: dict[str, Tensor] | None = None
) -> float:
    """Hold an unrolled model to the looped one, and return how far their results are apart, of the largest number.

    Args:
        plain: The unrolled model.
        looped: The looped one, with all the cycles that were unrolled, whatever exits it has.
        n_cycles: Cycles that were unrolled; all when not given.
        columns: What :func:`zero_columns` returned; without it the looped model runs without its zero tokens.

    Raises:
        UnsupportedError: They differ by more than sums in another order do.
    """
    ids = torch.arange(16, device=looped.device)[None] % looped.config.vocab_size
    call: dict[str, Any] = {"input_ids": ids, "use_cache": columns is not None}
    if columns is not None:
        call["cache"] = column_cache(plain, columns, 1)
        call["position_ids"] = torch.arange(16, device=ids.device)[None]
        call["attention_mask"] = ids.new_ones(1, 17)
    was_training = looped.training
    looped.eval()
    asked = Call(n_cycles=n_cycles, plain=columns is None, stay=True)
    want = result_of(looped(input_ids=ids, use_cache=False, return_dict=True, looping=asked))
    looped.train(was_training)
    got = result_of(plain(**call, return_dict=True))
    far, allowed = float((got - want).abs().max() / want.abs().max().clamp(min=1e-9)), 64 * torch.finfo(got.dtype).eps
    if not far <= allowed:
        raise UnsupportedError(
            f"The unrolled {looped.config.host.model_type!r} model differs from the looped one by {far:.1e} of the "
            f"largest number, more than {allowed:.1e}: its layers depend on their place."
        )
    return far


def unrolled_schedule(config: Any, n_cycles: int | None) -> list[VisitId]:
    """Return the visits of the first ``n_cycles`` cycles.

    Raises:
        UnsupportedError: The model has fewer.
    """
    if n_cycles is not None and not 1 <= n_cycles <= config.depth:
        raise UnsupportedError(f"n_cycles is {n_cycles}, expected 1 to {config.depth}.")
    kept: list[VisitId] = [visit for visit in config.schedule if n_cycles is None or visit[1] < n_cycles]
    return kept


def _layer(looped: Looped, visit: VisitId) -> dict[str, Tensor]:
    """Return the weights of a visit: the layer's, each visit's own copy, with its low-rank terms."""
    layer, cycle = visit
    state = {name: tensor.clone() for name, tensor in looped.layers[layer].state_dict().items()}
    if not looped.config.lora_rank or layer not in looped.config.middle:
        return state
    for name, module in hosts.linear_maps(looped.layers[layer]).items():
        key = f"{layer}:{name.replace('.', '/')}"
        a, b = (looped.zero_token.lora[f"{key}:{part}"][cycle].double() for part in "AB")
        change = (b @ a).mT if isinstance(module, Conv1D) else b @ a
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = (weight.double() + change).to(weight.dtype)
    return state


@torch.no_grad()
def zero_columns(looped: Looped, *, n_cycles: PositiveInt | None = None) -> dict[str, Tensor]:
    """Return the key of each unrolled layer's zero token (g, k), by slot.

    Raises:
        UnsupportedError: A layer has no zero token, or one whose key is not the same for all queries.
    """
    config: Any = looped.config
    visits = unrolled_schedule(config, n_cycles)
    if not config.zero_token:
        raise UnsupportedError("The model has no zero tokens, and its plain one needs no columns.")
    _check_columns(config)
    found = {}
    for slot, visit in enumerate(visits):
        if config.zero_kind == "off_by_one":
            key = next(looped.parameters()).new_zeros(hosts.zero_key_shape(config.host))
        else:
            key = looped.zero_token()["zero_key"][config.rows[visit]]
            if config.zero_key_norm:
                key = hosts.normed_key(hosts.attention_of(looped.layers[visit[0]]), key)
        found[f"zero_key.{slot}"] = key.contiguous()
    return found


def column_cache(plain: PreTrainedModel, columns: dict[str, Tensor], batch: PositiveInt) -> DynamicCache:
    """Return a cache whose first column holds the zero tokens; positions of the text still start at 0.

    Call the plain model with this cache, ``position_ids`` that start at 0, and an ``attention_mask`` with one more 1 in
    front.
    """
    cache = DynamicCache(config=plain.config)
    for slot in range(len(columns)):
        key = columns[f"zero_key.{slot}"][None, :, None].expand(batch, -1, 1, -1)
        cache.update(key, torch.zeros_like(key), slot)
    return cache
