"""Rows of data as measures and rewards see them: plain dictionaries of one kind, and how an answer to one is scored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

Row: TypeAlias = dict[str, Any]
Normalization: TypeAlias = Literal["edges", "squad"]


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, and how an answer to one of them is scored.

    Args:
        kind: Name of the kind: a key of :data:`modicum.registry.row_kind`.
        rows: The rows.
        score: From the index of a row and an answer to a number in [0, 1]; ``None`` where only the expected
            completion is known.
        normalization: How answers are compared with the expected ones; see
            :func:`modicum.evaluate.measures.exact_match.normalize`.
    """

    kind: str
    rows: list[Row]
    score: Callable[[int, str], float] | None = None
    normalization: Normalization = "edges"

    def __len__(self) -> int:
        return len(self.rows)
