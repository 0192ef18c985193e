"""Batches as objectives see them: a mapping of tensors whose rows may hold padding or several packed documents."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from modicum.errors import ModicumError, RecipeError

Batch: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class Documents:
    """The documents of a batch as rows: where each token lies in the flat batch, and which places are tokens."""

    index: Int64[Tensor, "n l"]
    real: Bool[Tensor, "n l"]


def attended(batch: Batch) -> Bool[Tensor, "b t"]:
    """Mark the tokens that are not padding; a mask of another form than (rows, tokens) says nothing about padding."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        return torch.ones_like(ids, dtype=torch.bool)
    return mask.bool()


def documents(batch: Batch) -> Documents:
    """Find the documents: one per row, or where ``position_ids`` begin again at 0, as many as that says.

    Example:
        >>> ids = torch.arange(5)[None]
        >>> documents({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1]])}).index
        tensor([[0, 1, 2],
                [3, 4, 0]])
    """
    ids = batch["input_ids"]
    real = attended(batch)
    positions = batch.get("position_ids")
    if positions is None or positions.shape != ids.shape:
        return Documents(torch.arange(ids.numel(), device=ids.device).reshape(ids.shape), real)
    first = real & (real.cumsum(-1) == 1)
    starts = (real & ((positions == 0) | first)).flatten()
    places = real.flatten().nonzero().flatten()
    which = starts.cumsum(0)[places] - 1
    begins = starts[places].nonzero().flatten()
    rank = torch.arange(places.numel(), device=ids.device) - begins[which]
    shape = (begins.numel(), int(rank.max()) + 1) if places.numel() else (0, 0)
    index = torch.zeros(shape, dtype=torch.int64, device=ids.device)
    is_token = torch.zeros(shape, dtype=torch.bool, device=ids.device)
    index[which, rank] = places
    is_token[which, rank] = True
    return Documents(index, is_token)


def require_labels(batch: Batch) -> None:
    """Refuse a batch whose labels are absent: masking first would put the mask into them."""
    if batch.get("labels") is None:
        raise ModicumError(
            f"The batch has no labels (it has {', '.join(sorted(batch))}). Wrap a collator that builds them from the "
            "clean ids, such as DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )


def require_mask_token(mask_token_id: int | None) -> int:
    """Refuse an objective that is to write a mask token and was given none."""
    if mask_token_id is None:
        raise RecipeError(
            "mask_token_id is missing. Set it to an id that the data never holds; ensure_mask_token(model, tokenizer) "
            "finds or adds one."
        )
    return mask_token_id


def by_document(
    batch: Batch,
    change: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    *,
    rng: torch.Generator | Tensor | None,
) -> Tensor:
    """Return ``input_ids`` with ``change(ids, real, keys)`` applied to the documents as rows.

    Args:
        batch: ``input_ids`` and ``labels`` at least.
        change: Gets ids and a mark of real tokens, both (documents, length), and the keys; returns ids.
        rng: A generator, or one key per document; ``None`` where the change does not draw, which leaves rows whole.
    """
    require_labels(batch)
    ids: Tensor = batch["input_ids"]
    if rng is None:
        return change(ids, attended(batch), None)
    found = documents(batch)
    keys = keys_of(rng, found.index.shape[0], ids.device)
    if "position_ids" not in batch:
        return change(ids, found.real, keys)
    rows = ids.flatten()[found.index]
    changed = change(rows, found.real, keys)
    if changed is rows:
        return ids
    flat = ids.flatten().clone()
    flat[found.index[found.real]] = changed[found.real]
    return flat.reshape(ids.shape)


def keys_of(rng: torch.Generator | Tensor, count: int, device: torch.device) -> Int64[Tensor, " count"]:
    """Return ``count`` keys, drawn from a generator or taken as they are."""
    if isinstance(rng, torch.Generator):
        if rng.device.type != device.type:
            raise ModicumError(f"rng is on {rng.device}, the batch on {device}. Make it on the batch's device.")
        return torch.randint(2**63 - 1, (count,), generator=rng, device=device)
    if rng.shape != (count,):
        raise ModicumError(f"rng holds keys of shape {tuple(rng.shape)}, expected one for each of {count} documents.")
    return rng.to(device)


def with_ids(batch: Batch, input_ids: Tensor) -> dict[str, Any]:
    """Return the batch with other ids; every other entry is the same object."""
    return {**batch, "input_ids": input_ids}
