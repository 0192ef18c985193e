"""The vocabulary in a ``tokenizer.json``, read as data."""

from __future__ import annotations

from collections.abc import Mapping
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
