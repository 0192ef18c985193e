"""NEFTune: uniform noise on the input embeddings in fine-tuning. A baseline that leaves the tokens as they are."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from modicum.errors import ModicumError
from modicum.objectives.batch import Batch, keys_of
from modicum.philox import dense_uniform
from modicum.registry import objective
from modicum.types import NonNegative


@objective("neftune", paper="arXiv:2310.05914", laws={"labels_untouched"}, acts_on="inputs_embeds")
def neftune(batch: Batch, *, alpha: NonNegative = 5.0, rng: torch.Generator | Int64[Tensor, " b"]) -> Batch:
    r"""Add noise to ``inputs_embeds``, the smaller the longer the row.

    .. math::
        x' = x + \frac{\alpha}{\sqrt{L d}}\, \epsilon, \qquad \epsilon \sim U(-1, 1)

    Args:
        batch: ``inputs_embeds``, and ``attention_mask`` where there is padding.
        alpha: Size of the noise; its Euclidean norm is about alpha divided by the root of 3.
        rng: A generator, or one key per row.

    Returns:
        The batch with noisy embeddings.

    Raises:
        ModicumError: There are no embeddings.

    Example:
        >>> out = neftune({"inputs_embeds": torch.zeros(1, 4, 25)}, alpha=5.0, rng=torch.Generator())
        >>> bool(out["inputs_embeds"].abs().max() <= 0.5)
        True

    Cost:
        One draw per embedding entry.

    Deviates:
        The length L counts the tokens of the row without its padding, as the paper has it, where the batch tells them
        apart; the train job's hook on the embedding sees no mask and takes the padded length, as transformers does.

    Reference:
        Jain et al., "NEFTune: Noisy Embeddings Improve Instruction Finetuning", ICLR 2024, arXiv:2310.05914,
        algorithm 1.
    """
    embeddings: Any = batch.get("inputs_embeds")
    if embeddings is None:
        raise ModicumError(f"neftune needs inputs_embeds, the batch has {', '.join(sorted(batch))}.")
    rows, length, width = embeddings.shape
    mask = batch.get("attention_mask")
    full = torch.full((rows,), length, device=embeddings.device)
    tokens = mask.sum(-1) if mask is not None and mask.dim() == 2 else full
    keys = keys_of(rng, rows, embeddings.device)
    noise = 2 * dense_uniform(keys, (length, width), device=embeddings.device) - 1
    scale = alpha / (tokens.float().clamp(min=1) * width).sqrt()
    noisy = embeddings.float() + scale[:, None, None] * noise
    return {**batch, "inputs_embeds": noisy.to(embeddings.dtype)}
