"""The mask token of a model that was trained without one: find or add it, keep it out of generation, drop it after.

A reserved token that the vocabulary holds anyway is preferred, because nothing changes size. After training the row is
not needed: the mask is never a target and never in a prompt. Models and tokenizers are used by their public methods
alone, so nothing is imported here.
"""

from __future__ import annotations

import re
from typing import Any, Literal, TypeAlias

import torch

from modicum.errors import CheckpointError, UnsupportedError

Prefer: TypeAlias = Literal["reserved", "add"]
Init: TypeAlias = Literal["mean", "normal"]
MASK = "[MASK]"
# Llama 3, Mistral, Gemma and BERT-like vocabularies, Qwen and Phi in that order.
RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|\[control_\d+\]|<unused\d+>|\[unused\d+\]|<\|extra_\d+\|>|<\|dummy_\d+\|>"
)


def ensure_mask_token(
    model: Any, tokenizer: Any, *, prefer: Prefer = "reserved", init: Init = "mean", seed: int = 0
) -> int:
    """Return the id of the mask token, which is made when there is none.

    The tokenizer's own mask token is taken as it is. Otherwise a reserved token or a new one becomes it, and its row
    (input and output) starts at the mean of the others.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer; it learns the mask token.
        prefer: ``reserved`` uses an unused token of the vocabulary when there is one, ``add`` always adds ``[MASK]``.
        init: Start the row at the mean of all rows, or at a normal draw of the rows' mean and standard deviation.
        seed: Of the normal draw.

    Raises:
        UnsupportedError: The model is not a causal decoder.
        CheckpointError: The tokenizer knows more tokens than the model has rows.
    """
    check_causal(model)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"The tokenizer has {len(tokenizer)} tokens, the model {rows} embedding rows. Load the two from the same "
            "checkpoint, or call model.resize_token_embeddings(len(tokenizer))."
        )
    known = getattr(tokenizer, "mask_token_id", None)
    if known is not None:
        return int(known)
    used = len(tokenizer)
    reserved = _reserved(tokenizer) if prefer == "reserved" else None
    tokenizer.add_special_tokens({"mask_token": reserved or MASK})
    mask_id = int(tokenizer.mask_token_id)
    if mask_id >= rows:
        # Mean-resizing would draw from a fitted normal; the row is set below in any case.
        model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    _set_row(model, mask_id, used, init, seed)
    return mask_id


def drop_mask_token(model: Any, *, mask_token_id: int, rows: int) -> None:
    """Cut an added mask row off the end, so that the model has ``rows`` embeddings as it had before training.

    A reserved token has a row in any case: there is nothing to cut, and nothing is done.
    """
    if mask_token_id < rows:
        return
    present = model.get_input_embeddings().weight.shape[0]
    if present != mask_token_id + 1:
        raise CheckpointError(
            f"The mask token {mask_token_id} is not the last of {present} rows. Tokens were added after it: keep it."
        )
    model.resize_token_embeddings(rows)


def suppress_mask_token(generation_config: Any, *, mask_token_id: int) -> None:
    """Set the mask's logit to minus infinity in generation: its row was never a target, so its logit means nothing."""
    kept = list(getattr(generation_config, "suppress_tokens", None) or [])
    generation_config.suppress_tokens = [*kept, *({mask_token_id} - set(kept))]


def check_causal(model: Any) -> None:
    """Refuse models that do not predict the next token from the ones before it."""
    config = model.config
    bidirectional = hasattr(config, "is_decoder") and not config.is_decoder and _is_encoder(model)
    if getattr(config, "is_encoder_decoder", False) or bidirectional or not model.can_generate():
        raise UnsupportedError(
            f"{type(model).__name__} is not a causal decoder. MEAP is next-token prediction under masked inputs: use a "
            "model that AutoModelForCausalLM loads."
        )


def _is_encoder(model: Any) -> bool:
    base = getattr(model, getattr(model, "base_model_prefix", ""), None)
    return type(getattr(base, "encoder", None)).__name__.endswith("Encoder")


def _reserved(tokenizer: Any) -> str | None:
    found = {int(i): t for t, i in tokenizer.get_vocab().items() if RESERVED.fullmatch(t)}
    return found[min(found)] if found else None


@torch.no_grad()
def _set_row(model: Any, mask_id: int, used: int, init: Init, seed: int) -> None:
    tables = [model.get_input_embeddings(), model.get_output_embeddings()]
    for number, table in enumerate(t for t in tables if t is not None):
        weight = table.weight
        if number and weight is tables[0].weight:
            continue
        # Rows past the vocabulary are padding and would pull the mean towards zero.
        rows = weight[:used].double()
        row = rows.mean(0)
        if init == "normal":
            rng = torch.Generator().manual_seed(seed)
            row = row + rows.std(0) * torch.randn(row.shape, generator=rng, dtype=torch.float64).to(row.device)
        weight[mask_id] = row.to(weight.dtype)
