"""Token dropout: replace a share of the input ids by random ones, or as in BERT by a mix.

The control that tells whether a *mask token* matters, or any corruption of the input does. ``mask_share=0.8,
random_share=0.1`` is the 80/10/10 corruption of BERT under a causal model.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from modicum.errors import RecipeError
from modicum.objectives.batch import Batch, by_document, require_mask_token, with_ids
from modicum.objectives.selection import select_positions
from modicum.philox import words
from modicum.registry import objective
from modicum.types import NonNegativeInt, PositiveInt, UnitInterval


@objective("token_dropout", paper="arXiv:1810.04805", laws={"labels_untouched"})
def token_dropout(
    batch: Batch,
    *,
    ratio: UnitInterval = 0.15,
    mask_share: UnitInterval = 0.0,
    random_share: UnitInterval = 1.0,
    mask_token_id: NonNegativeInt | None = None,
    vocab_size: PositiveInt | None = None,
    protect_ids: tuple[int, ...] | None = None,
    rng: torch.Generator | Int64[Tensor, " b"],
) -> Batch:
    r"""Corrupt an exact share of the input ids: some become the mask, some a random id, the rest stays.

    .. math::
        k = \max(1, \lfloor P\, n \rfloor) \text{ positions}, \qquad
        \Pr[\text{mask}] = m, \quad \Pr[\text{random}] = r, \quad \Pr[\text{kept}] = 1 - m - r

    Args:
        batch: ``input_ids`` and ``labels``.
        ratio: Share P of the eligible positions, in [0, 1].
        mask_share: Share m of the corrupted tokens that become the mask token.
        random_share: Share r of the corrupted tokens that become a uniformly random id.
        mask_token_id: Needed when ``mask_share`` is not 0.
        vocab_size: Ids to draw from; needed when ``random_share`` is not 0.
        protect_ids: Ids that are never replaced.
        rng: A generator, or one key per document.

    Returns:
        The batch with other ``input_ids``.

    Raises:
        ModicumError: Shares pass 1, or labels, the mask id or the vocabulary's size are missing.

    Example:
        >>> ids = torch.full((1, 9), 50)
        >>> out = token_dropout({"input_ids": ids, "labels": ids}, ratio=0.5, vocab_size=50, rng=torch.Generator())
        >>> int((out["input_ids"] != 50).sum())
        4

    Cost:
        Linear in the ids; no extra pass.

    Deviates:
        BERT predicts the corrupted tokens in both directions; here the loss is next-token prediction.

    Reference:
        Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", NAACL 2019, arXiv:1810.04805, appendix
        C.2.
    """
    if mask_share + random_share > 1 + 1e-9:
        raise RecipeError(f"mask_share {mask_share} and random_share {random_share} pass 1 together. Lower one.")

    def corrupt(ids: Tensor, real: Tensor, keys: Tensor | None) -> Tensor:
        if keys is None:
            raise RecipeError("token_dropout needs rng.")
        protected = torch.isin(ids, torch.tensor(protect_ids or (), dtype=ids.dtype, device=ids.device))
        selected = select_positions(real & ~protected, keys, ratio=ratio, real=real)
        lot = _by_token(words(keys, ids.shape[1], stream=2), real).double() / 2**32
        out = ids
        if mask_share:
            out = torch.where(selected & (lot < mask_share), require_mask_token(mask_token_id), out)
        if random_share:
            chosen = selected & (lot >= mask_share) & (lot < mask_share + random_share)
            out = torch.where(chosen, random_ids(ids, keys, real, vocab_size=vocab_size), out)
        return out

    return with_ids(batch, by_document(batch, corrupt, rng=rng))


def random_ids(
    like: Int[Tensor, "b t"],
    keys: Int64[Tensor, " b"],
    real: Bool[Tensor, "b t"],
    *,
    vocab_size: PositiveInt | None,
) -> Int[Tensor, "b t"]:
    """Return ids drawn uniformly from the vocabulary, in the shape and type of ``like``."""
    if vocab_size is None:
        raise RecipeError("vocab_size is missing. Set it to the number of ids to draw random replacements from.")
    return (_by_token(words(keys, like.shape[1], stream=3), real) % vocab_size).to(like.dtype)


def _by_token(drawn: Int64[Tensor, "b t"], real: Bool[Tensor, "b t"]) -> Int64[Tensor, "b t"]:
    """Give each place the word of its token's number, so that padding does not move the draw."""
    return drawn.gather(1, (real.cumsum(-1) - 1).clamp(min=0))
