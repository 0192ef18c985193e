"""The vocabulary in a ``tokenizer.json``, read as data, and what a model has rows and positions for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from modicum.borders import border
from modicum.errors import CheckpointError, UnsupportedError

TOKENIZER = "tokenizer.json"
SPARSE = 100_000  # rows that a vocabulary may leave free, besides four times as many as it has tokens


def token_ids(tokenizer: Mapping[str, Any], owner: str) -> dict[str, int]:
    """Return the vocabulary in a model's ``tokenizer.json``.

    Raises:
        CheckpointError: It is malformed, or its ids are so far apart that nobody has rows for them.
    """
    with border(f"{owner}: {TOKENIZER}"):
        ids = _token_ids(tokenizer, owner)
    odd = next((token for token, row in ids.items() if not 0 <= row < 4 * len(ids) + SPARSE), None)
    if odd is not None:
        raise CheckpointError(
            f"{owner}: {TOKENIZER} gives the token {odd!r:.60} the id {ids[odd]}, and it has {len(ids)} tokens. "
            "Download it again."
        )
    return ids


def _token_ids(tokenizer: Mapping[str, Any], owner: str) -> dict[str, int]:
    vocabulary = tokenizer.get("model", {}).get("vocab")
    if isinstance(vocabulary, list):
        ids = {str(item[0]): position for position, item in enumerate(vocabulary)}
    elif isinstance(vocabulary, dict):
        ids = {str(token): int(position) for token, position in vocabulary.items()}
    else:
        raise UnsupportedError(f"{owner}: its tokenizer.json holds no vocabulary that can be read.")
    return ids | {str(item["content"]): int(item["id"]) for item in tokenizer.get("added_tokens") or []}


def check_ids(model: Any, rows: Iterable[Sequence[int]]) -> None:
    """Refuse tokens for which a model has no embedding: those of a tokenizer that was given more words than it.

    Raises:
        UnsupportedError: There is one.
    """
    table = model.get_input_embeddings()
    largest = max((max(ids, default=0) for ids in rows), default=0)
    if table is not None and largest >= (size := len(table.weight)):
        raise UnsupportedError(
            f"The tokenizer gives the token {largest}, and the model has embeddings of {size}. Use the tokenizer that "
            "the model was trained with, or resize the model's embeddings (resize_token_embeddings)."
        )


def check_positions(model: Any, length: int, told: str, remedy: str) -> None:
    """Refuse what is longer than a model's positions.

    Args:
        model: What reads it.
        length: In tokens, those to be generated included.
        told: What it is, up to the verb, for the error.
        remedy: What to do about it.

    Raises:
        UnsupportedError: It is longer.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UnsupportedError(f"{told} the model's {limit} positions. {remedy}")
