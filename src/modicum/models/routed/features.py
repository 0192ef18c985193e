"""What a router sees of a prompt: a hidden state of the host, or how sure each expert is."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from modicum.evaluate.answer_states import states_entering


def pooled(
    host: nn.Module,
    block: nn.Module,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pooling: str = "mean",
    **inputs: Any,
) -> Tensor:
    """Return the mean, or the last, of the states that reach a block, over each prompt's real tokens ``(n, d)``.

    The pass ends at the block: what lies behind it is not computed. Neither padding nor other rows count; see
    :func:`real_tokens` for which tokens are padding.
    """
    given = _inputs(host, input_ids, attention_mask, inputs)
    states = states_entering(block, lambda: host(**given)).to(torch.float64)
    real = real_tokens(host, states, input_ids, attention_mask).to(states)
    if pooling == "mean":
        return ((states * real[:, :, None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)).cpu()
    return states[torch.arange(len(states)), _last(real)].cpu()


def entropies(
    host: nn.Module, *, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **inputs: Any
) -> Tensor:
    """Return the entropy of the next token after each prompt, in nats ``(n)``."""
    logits = host(**_inputs(host, input_ids, attention_mask, inputs)).logits
    last = logits[torch.arange(len(logits)), _last(real_tokens(host, logits, input_ids, attention_mask))]
    logs = last.double().log_softmax(-1)
    return -(logs.exp() * logs).sum(-1).cpu()


def real_tokens(host: Any, states: Tensor, ids: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return which tokens of a batch are no padding ``(n, t)``.

    Without a mask these are all, but for a run at a row's end of the padding token or of token 0, which test harnesses
    fill rows with: it would count as much as the prompt. A row of nothing else is taken as it is.
    """
    if mask is not None:
        return mask[:, -states.shape[1] :].to(states.device)
    if ids is None:
        return states.new_ones(states.shape[:2])
    pad = getattr(host.config, "pad_token_id", None)
    fill = (ids == 0) | (ids == (0 if pad is None else pad))
    behind = fill.flip(1).long().cumprod(1).flip(1).bool()
    return (~behind | behind.all(1, keepdim=True)).to(states.device)


def left_padded(prompts: Sequence[Sequence[int]], device: Any = None) -> tuple[Tensor, Tensor]:
    """Return prompts as one batch, filled up in front, and its mask ``(n, t)``.

    Example:
        >>> ids, mask = left_padded([[5], [6, 7]])
        >>> ids.tolist(), mask.tolist()
        ([[0, 5], [6, 7]], [[0, 1], [1, 1]])
    """
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _last(real: Tensor) -> Tensor:
    """Return the place of the last real token of each row, padded left or right."""
    places = torch.arange(real.shape[1], device=real.device)
    return (real > 0).mul(places + 1).amax(1).sub(1).clamp_min(0).long()


def _inputs(host: Any, ids: Tensor | None, mask: Tensor | None, inputs: dict[str, Any]) -> dict[str, Any]:
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **inputs}
    if mask is not None and mask.ndim == 2 and "position_ids" in signature(host.forward).parameters:
        given["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)
    return {key: value for key, value in given.items() if value is not None}
