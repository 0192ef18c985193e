"""Whether a model keeps the samples of a packed row apart, found out by trying, and the mask for one that does not.

Most architectures of transformers read from ``position_ids`` that begin anew where a sample begins. Others ignore them
without a word, and a recurrent state passes any mask: what a model does is seen on three short samples in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from modicum.errors import UnsupportedError, first_line
from modicum.shortage import pass_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    Collator = Callable[[Sequence[dict[str, list[int]]]], dict[str, Any]]

LENGTH = 8  # tokens of a sample: more than the convolutions of state-space models reach


@dataclass(frozen=True)
class BlockMask:
    """Give packed batches the mask in which a token sees the tokens before it in its own sample alone.

    Args:
        inner: The collator that makes the batch.
        dtype: Of the model: the mask is added to its attention scores.
    """

    inner: Collator
    dtype: torch.dtype

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the batch, with an ``attention_mask`` of (rows, 1, tokens, tokens) where rows are packed."""
        batch = self.inner(examples)
        return batch | {"attention_mask": self._mask(batch["position_ids"])} if "position_ids" in batch else batch

    def _mask(self, positions: Tensor) -> Tensor:
        import torch

        sample = (positions == 0).cumsum(-1)
        seen = (sample[:, :, None] == sample[:, None, :]).tril()
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(seen.shape, dtype=self.dtype).masked_fill_(~seen, lowest)[:, None]


def isolating(model: Any, collator: Collator, *, ids: Sequence[int], max_length: int) -> Collator:
    """Return ``collator``, or a wrapper of it, under which ``model`` keeps packed samples apart.

    Args:
        model: On the device on which it works.
        collator: Makes batches of packed rows.
        ids: Some ordinary tokens, two at least.
        max_length: Of the rows to come.

    Raises:
        UnsupportedError: Samples see each other whatever the batch says.

    Cost:
        Three forward passes over 24 tokens, at most eight.
    """
    why = trouble(model, collator, ids=ids)
    if why is None:
        return collator
    # A mask given whole replaces the model's own, its sliding window included.
    window = getattr(model.config.get_text_config(), "sliding_window", None)
    masked = BlockMask(collator, model.dtype)
    if (window is None or max_length <= window) and trouble(model, masked, ids=ids) is None:
        return masked
    used = getattr(model.config, "_attn_implementation", None)
    raise UnsupportedError(
        f"data.packing cannot be used with {model.config.model_type} (attention {used}): {why}. Set packing: false."
    )


def ordinary_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return some tokens that a model can be tried with."""
    special = set(tokenizer.all_special_ids)
    return list(islice((token for token in range(len(tokenizer)) if token not in special), 29))


def trouble(model: Any, collator: Collator, *, ids: Sequence[int]) -> str | None:
    """Return what is wrong with packed rows; ``None`` where samples have their own logits whatever lies beside them."""
    import torch

    training = model.training
    model.eval()
    try:
        clean, changed = (_logits(model, collator, ids, shift) for shift in (0, 1))
        beside = torch.arange(3 * LENGTH) // LENGTH != 1
        # Equal to the bit, or where experts share a kernel, up to rounding that no gradient knows of.
        if not torch.equal(clean[:, beside], changed[:, beside]) and _reaches(model, collator, ids, beside):
            return "the samples of a row see each other, so what is learned or measured is not what the data holds"
        # A mask that is read in another sense keeps samples apart too, and spoils each.
        alone = _alone(model, ids)
        rounding = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
        if not bool(((clean - alone).abs().amax() <= rounding * alone.abs().amax()).all()):
            return "a sample in a packed row has other logits than the same sample alone"
        return None
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError, AssertionError) as error:
        pass_on(error)
        return f"it does not take a packed row ({type(error).__name__}: {first_line(error).rstrip('.')})"
    finally:
        model.train(training)


def _batch(model: Any, collator: Collator, ids: Sequence[int], shift: int) -> dict[str, Any]:
    """Return one row of three samples; ``shift`` changes every token of the middle one."""
    tokens = [ids[(place + (shift if place // LENGTH == 1 else 0)) % len(ids)] for place in range(3 * LENGTH)]
    places = [place % LENGTH for place in range(3 * LENGTH)]
    batch = collator([{"input_ids": tokens, "labels": list(tokens), "position_ids": places}])
    return {
        key: value.to(model.device) if hasattr(value, "to") else value
        for key, value in batch.items()
        if key != "labels"
    }


def _alone(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits of the three samples, each in a row of its own, side by side."""
    import torch

    tokens = torch.tensor([ids[place % len(ids)] for place in range(3 * LENGTH)], device=model.device)
    with torch.no_grad():
        # Without a cache, whose kinds differ by model, and without a mask: the rows are full.
        logits: Tensor = model(input_ids=tokens.reshape(3, LENGTH), use_cache=False).logits.float()
    return logits.reshape(1, 3 * LENGTH, -1)


def _logits(model: Any, collator: Collator, ids: Sequence[int], shift: int) -> Tensor:
    import torch

    with torch.no_grad():
        logits: Tensor = model(**_batch(model, collator, ids, shift)).logits.float()
    return logits


def _reaches(model: Any, collator: Collator, ids: Sequence[int], beside: Tensor) -> bool:
    """Whether the gradient of the logits beside the middle sample reaches its embeddings."""
    import torch

    kept: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[-1]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        logits = model(**_batch(model, collator, ids, 0)).logits.float()
    finally:
        handle.remove()
    # Unequal weights, so that contributions do not cancel.
    weights = torch.linspace(1, 2, logits[:, beside].numel(), device=logits.device).sin()
    (gradient,) = torch.autograd.grad((logits[:, beside].flatten() * weights).sum(), kept[:1])
    return bool((gradient[:, ~beside] != 0).any())
