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


def answered(row: Row, answer: str) -> Row:
    """Return the prompt of a row with an answer to it, as an ordinary chat or completion.

    Example:
        >>> answered({"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, "2")
        {'prompt': '1 + 1?', 'completion': '2'}
    """
    if "messages" in row:
        return {"messages": [*row["messages"], {"role": "assistant", "content": answer}]}
    return {key: row[key] for key in ("system", "prompt", "plain", "joined") if key in row} | {"completion": answer}


def question_of(row: Row) -> str:
    """Return the text that asks a row's question: its prompt, or all turns before the answer.

    Example:
        >>> question_of({"prompt": "1 + 1?", "completion": "2"})
        '1 + 1?'
    """
    if "messages" in row:
        spoken = [m["content"] for m in row["messages"] if m["role"] != "system"]
        return "\n".join(spoken[:-1] if row["messages"][-1]["role"] == "assistant" else spoken)
    return str(row.get("prompt", ""))
