"""Hold a host that is not among the tested ones to its own results, when it is converted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modicum.errors import UnsupportedError
from modicum.models.zero_token import hosts
from modicum.models.zero_token.body import Call
from modicum.shortage import pass_on


@torch.no_grad()
def compare(model: PreTrainedModel, looped: Any) -> None:
    """Hold a host that is not among the tested ones to its own result: one cycle without zero tokens changes nothing.

    Raises:
        UnsupportedError: It does, so that something happens between the layers of this host.
    """
    if looped.config.loop_connection is not None or looped.config.order != "cycle":
        return
    model_was_training = model.training
    model.eval()
    ids = torch.arange(8, device=model.device)[None] % model.config.vocab_size
    want = model(input_ids=ids, use_cache=False, return_dict=True)
    model.train(model_was_training)
    got = _tried(looped, ids, use_cache=False, looping=Call(n_cycles=1, plain=True))
    if not torch.equal(result_of(want), result_of(got)):
        raise hosts.refused(
            model.config, "run once and without zero tokens its layers give another result than the model itself"
        )


@torch.no_grad()
def decode(looped: Any) -> None:
    """Let a host that is not among the tested ones run with its zero tokens, and decode one token with a cache.

    Raises:
        UnsupportedError: It fails, or decodes something else than it computes at once.
    """
    ids = torch.arange(8, device=looped.device)[None] % looped.config.vocab_size
    _tried(looped, ids, use_cache=False)
    if looped.kind == "sequence":
        return  # it never decodes

    def once() -> Call:
        return Call(n_cycles=1, plain=True)

    want = result_of(_tried(looped, ids, use_cache=False, looping=once()))[:, -1]
    cache = _tried(looped, ids[:, :-1], use_cache=True, looping=once()).cache
    got = result_of(_tried(looped, ids[:, -1:], use_cache=True, cache=cache, looping=once()))[:, -1]
    _tried(looped, ids[:, -1:], use_cache=True, cache=_tried(looped, ids[:, :-1], use_cache=True).cache)
    # Sums are made in another order, in the weights' own precision.
    if not (got - want).abs().max() <= max(1e-3, 64 * torch.finfo(want.dtype).eps) * want.abs().max():
        raise hosts.refused(looped.config.host, "with a cache its layers give another result than without")


def _tried(looped: Any, ids: Tensor, **call: Any) -> Any:
    try:
        return looped(input_ids=ids, return_dict=True, **call)
    except UnsupportedError:
        raise
    except Exception as error:
        pass_on(error)
        raise hosts.refused(looped.config.host, f"its layers failed with {error!r}") from error


def result_of(out: Any) -> Tensor:
    """Return what a model computes: its logits, or its states where it has no head."""
    found: Tensor = out["logits" if "logits" in out else "last_hidden_state"]
    return found
