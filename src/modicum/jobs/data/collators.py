"""From tokenised rows to batches: padding, and logits only where a label follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modicum.errors import CheckpointError
from modicum.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PaddingCollator:
    """Pad examples on the right to the longest of the batch; padding has no label.

    Args:
        tokenizer: Gives the padding token, or failing that the end-of-text token.
        multiple: Round the length up to a multiple of this, which some accelerators like.
    """

    tokenizer: PreTrainedTokenizerBase
    multiple: int = 1

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the batch: tensors, and for packed rows the order not to make a cache."""
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        length = -(-length // self.multiple) * self.multiple
        fill = {"input_ids": pad_id(self.tokenizer), "labels": IGNORED, "attention_mask": 0}
        batch: dict[str, Any] = {}
        for key in examples[0]:
            padded = []
            for example in examples:
                missing = length - len(example[key])
                # Padding of a packed row is one more sample, so that no real one sees it.
                tail = list(range(missing)) if key == "position_ids" else [fill[key]] * missing
                padded.append([*example[key], *tail])
            batch[key] = torch.tensor(padded)
        # With a cache, transformers takes the samples of a packed row for one, and they see each other.
        return batch | {"use_cache": False} if "position_ids" in batch else batch


def collate(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    """Return the collator for data of :func:`modicum.jobs.data.tokens.tokenize`.

    Raises:
        CheckpointError: The tokenizer has neither a padding nor an end-of-text token.
    """
    pad_id(tokenizer)
    return PaddingCollator(tokenizer)


@dataclass(frozen=True)
class LabelledLogits:
    """Ask the model for logits only where a label follows.

    The output layer is the widest of a small model, and with labels on the completion only most of its work is thrown
    away: a fifth of a training step for SmolLM2-135M, and most of its memory. ``logits_to_keep`` and ``shift_labels``
    are arguments that transformers' causal models and their loss take.

    Args:
        inner: The collator that makes the batch.
    """

    inner: Callable[[Sequence[dict[str, list[int]]]], dict[str, Any]]

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the batch with the positions to predict from and their labels."""
        batch = self.inner(examples)
        targets = batch["labels"][:, 1:]
        positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
        return {**batch, "logits_to_keep": positions, "shift_labels": targets[:, positions]}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise CheckpointError("The tokenizer has neither a padding nor an end-of-text token. Set pad_token in its config.")
