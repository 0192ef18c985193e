"""Conversations, of which the assistant's turns are learned."""

from __future__ import annotations

from modicum.errors import RecipeError
from modicum.evaluate.rows import Row
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import is_text, tokenize_answers
from modicum.registry import row_kind


@row_kind("chat", fields=("messages",), order=10, tokenize=tokenize_answers, surrounds=("system",))
def chat(section: DataSection, row: Row, index: int) -> Row:
    """Read a conversation; ``section.system`` is put before one that has no system message.

    Args:
        section: ``fields`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: The field holds no list of messages.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> chat(DataSection(path="x", system="Be kind."), {"messages": [{"role": "user", "content": "hi"}]}, 0)
        {'messages': [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'hi'}]}
    """
    name = section.fields.of("messages")
    messages = row.get(name)
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        raise RecipeError(
            f"{section.path}, row {index}: field {name!r} is {messages!r:.80}, "
            "expected a list of {role: …, content: …}."
        )
    if section.system is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": section.system}, *messages]
    return {"messages": messages}


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(is_text(value.get(key)) for key in ("role", "content"))
