"""Greedy generation in batches, with left padding.

Prompts are sorted by length, so that little is spent on padding and the order in which they come does not matter. The
batch size changes nothing but the last digits of the logits; in float32 that practically never changes a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modicum.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Iterable[int],
    pad: int,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token or the limit.

    Args:
        model: A causal language model with a key-value cache.
        prompts: Token ids, at least one each.
        max_new_tokens: Limit on the tokens of an answer.
        stop: Tokens that end an answer; they are left out of it.
        pad: Token to fill shorter prompts with; it is masked.
        batch_size: Prompts at a time.
        progress: Called with the number of prompts just finished.

    Returns:
        The tokens of each answer, in the order of the prompts.

    Raises:
        UnsupportedError: A prompt leaves no room for an answer within the model's positions.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise UnsupportedError(
            f"A prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {limit} positions. "
            "Lower max_new_tokens or shorten the prompts."
        )
    stops = torch.tensor(sorted(stop), device=model.device, dtype=torch.long)
    # The longest first: if memory is short, it shows at once, and the estimated time falls instead of rising.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), list(prompts[i])))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        tokens = _continue(model, [prompts[i] for i in chosen], max_new_tokens=max_new_tokens, stops=stops, pad=pad)
        ended = torch.isin(tokens, stops).cpu()
        for row, index in enumerate(chosen):
            cut = ended[row].nonzero()
            answers[index] = tokens[row, : int(cut[0]) if len(cut) else None].tolist()
        progress(len(chosen))
    return answers


def _continue(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stops: Tensor, pad: int
) -> Tensor:
    """Return up to ``max_new_tokens`` tokens for each prompt of one batch; tokens after a stop have no meaning."""
    shared = _shared_prefix(prompts)
    length = max(map(len, prompts))
    padded = [[pad] * (length - len(prompt)) + list(prompt[shared:]) for prompt in prompts]
    masks = [[1] * shared + [0] * (length - len(prompt)) + [1] * (len(prompt) - shared) for prompt in prompts]
    ids, mask = (torch.tensor(rows, device=model.device) for rows in (padded, masks))
    positions = (mask.cumsum(-1) - 1)[:, shared:].clamp_min(0)
    # Only the last position's logits are needed: over a whole batch the others would take gigabytes.
    options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(model) else {}
    cache = _read(model, prompts[0][:shared], len(prompts), options) if shared else None
    ended, tokens = torch.zeros(len(prompts), dtype=torch.bool, device=model.device), []
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            cache=cache,
            use_cache=True,
            **options,
        )
        cache = output.cache
        ids = output.logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(ids)
        ended |= torch.isin(ids[:, 0], stops)
        if ended.all():
            break
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return torch.cat(tokens, dim=1)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts share, leaving each at least one of its own to continue from."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return min(same, min(map(len, prompts)) - 1) if len(prompts) > 1 else 0


def _read(model: PreTrainedModel, prefix: Sequence[int], copies: int, options: dict[str, Any]) -> Any:
    """Read what all prompts begin with, such as the system message, once: half of the work for short questions."""
    ids = torch.tensor([list(prefix)], device=model.device)
    positions = torch.arange(len(prefix), device=model.device)[None]
    output = model(
        input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, use_cache=True, **options
    )
    output.cache.batch_repeat_interleave(copies)
    return output.cache


def _arguments(model: PreTrainedModel) -> Iterable[str]:
    # The forward of a PEFT adapter takes any argument and passes it on: the base model's signature counts.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return signature(base.forward).parameters


def stop_tokens(model: PreTrainedModel, tokenizer: Any, *, line: bool = False) -> set[int]:
    """Return the tokens that end an answer: the model's own and the tokenizer's, and for one line the line feed."""
    own = getattr(model.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"] if line else []
    # A tokenizer that needs several tokens for a line feed has none that always ends a line.
    return {int(token) for token in found if token is not None} | set(newline if len(newline) == 1 else ())
