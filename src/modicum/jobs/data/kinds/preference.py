"""Pairs of answers to one prompt, of which the chosen one is the better."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from modicum.errors import RecipeError
from modicum.evaluate.rows import Row, Rows, answered
from modicum.jobs.data.kinds.completion import prompted
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import is_text, text_of, tokenize_answers
from modicum.registry import row_kind

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

SIDES = ("chosen", "rejected")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # of dialogues that are written as one text


def tokenize_chosen(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, note: Callable[[str], None] | None
) -> datasets.Dataset:
    """Learn the chosen answers alone, for objectives over tokens."""
    if note:
        note(f"{section.path}: rows are pairs, and only their chosen answers are learned. objective: dpo learns pairs.")
    answers = [answered(row, row["chosen"]) for row in rows.rows]
    return tokenize_answers(replace(rows, rows=answers), tokenizer, section, note)


@row_kind("preference", fields=SIDES, order=5, tokenize=tokenize_chosen)
def preference(section: DataSection, row: Row, index: int) -> Row:
    r"""Read a prompt with a chosen and a rejected answer, in any of the forms that TRL reads.

    Prompt and answers are texts, or lists of messages. Without a prompt, it is how both conversations begin, or both
    texts; a text of turns such as ``\n\nHuman: …\n\nAssistant: …`` becomes a chat. Both texts are cut at white space,
    which their ends keep (``joined``) unless a chat template surrounds them.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source.
        index: Its number, for errors.

    Raises:
        RecipeError: A field is missing or of another form, or an answer is empty, or both are the same.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> preference(DataSection(path="x"), {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}, 0)
        {'prompt': '1 + 1?', 'chosen': '2', 'rejected': '3'}
    """
    where = f"{section.path}, row {index}"
    names = [section.fields.of(side) for side in SIDES]
    values = [row.get(name) for name in names]
    prompt = row.get(section.fields.of("prompt"))
    if all(isinstance(value, list) for value in values):
        found = _of_chats(prompt, values, names, where)
    else:
        texts = [text_of(section, row, side, index) for side in SIDES]
        found = _of_texts(prompt, texts, where) if prompt is None else _explicit(prompt, texts, where)
    for name, side in zip(names, SIDES):
        if not found[side].strip():
            raise RecipeError(f"{where}: the answer in {name!r} is empty, expected text. Drop the row.")
    if found["chosen"].strip() == found["rejected"].strip():
        raise RecipeError(f"{where}: chosen and rejected are the same text, so there is nothing to prefer. Drop it.")
    if "messages" in found:
        if section.system is not None and found["messages"][0]["role"] != "system":
            found["messages"] = [{"role": "system", "content": section.system}, *found["messages"]]
        return found
    if not found["prompt"].strip():
        raise RecipeError(f"{where}: the prompt is empty, expected text.")
    start = prompted(section, found.pop("prompt"), "")
    del start["completion"]
    return start | found


def _explicit(prompt: object, texts: Sequence[str], where: str) -> Row:
    answers = dict(zip(SIDES, texts))
    if isinstance(prompt, list):
        return {"messages": _messages(prompt, "prompt", where)} | answers
    if not is_text(prompt):
        raise RecipeError(f"{where}: the prompt is {prompt!r:.80}, expected text or a list of messages.")
    return {"prompt": prompt} | answers


def _of_texts(_prompt: None, texts: Sequence[str], where: str) -> Row:
    """Split two texts where they part, or where the last turn of a written dialogue begins."""
    dialogues = [_dialogue(text) for text in texts]
    if all(dialogues):
        return _of_chats(None, dialogues, SIDES, where)
    alike = next((i for i, (a, b) in enumerate(zip(*texts)) if a != b), min(map(len, texts)))
    start = max((match.end() for match in re.finditer(r"\s", texts[0][:alike])), default=0)
    prompt = texts[0][:start].rstrip()
    # The white space between them is the answers', which a chat template would put there instead.
    return {"prompt": prompt, "joined": True} | {side: text[len(prompt) :] for side, text in zip(SIDES, texts)}


def _dialogue(text: str) -> list[dict[str, str]]:
    r"""Return the turns of ``\n\nHuman: …\n\nAssistant: …``; nothing for a text of another form."""
    parts = re.split(r"(?:^|\n\n)(Human|Assistant): ?", text)
    if parts[0].strip() or len(parts) < 5:
        return []
    return [{"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]


def _of_chats(prompt: object, values: Sequence[Any], names: Sequence[str], where: str) -> Row:
    chats = [_messages(value, name, where) for value, name in zip(values, names)]
    if all(len(chat) == 1 for chat in chats) and prompt is not None:
        start: list[dict[str, str]] = [] if isinstance(prompt, str) else _messages(prompt, "prompt", where)
    else:
        shared = 0
        while shared < min(map(len, chats)) - 1 and chats[0][shared] == chats[1][shared]:
            shared += 1
        start, chats = chats[0][:shared], [chat[shared:] for chat in chats]
        if prompt is not None and not _begins(prompt, start, where):
            raise RecipeError(
                f"{where}: the prompt {prompt!r:.80} is not how the conversations in {names[0]!r} and {names[1]!r} "
                "begin. Drop it, or let them hold the answers alone."
            )
    for chat, name in zip(chats, names):
        if len(chat) != 1 or chat[0]["role"] != "assistant":
            raise RecipeError(
                f"{where}: after the shared prompt {name!r} holds {_roles(chat)}, expected one message of the assistant"
            )
    answers = {side: chat[0]["content"] for side, chat in zip(SIDES, chats)}
    if not start and isinstance(prompt, str):
        return {"prompt": prompt} | answers
    if not start or start[-1]["role"] == "assistant":
        raise RecipeError(
            f"{where}: the prompt holds {_roles(start)}, expected a conversation that ends with the user."
        )
    return {"messages": start} | answers


def _begins(prompt: object, start: Sequence[Mapping[str, str]], where: str) -> bool:
    """Whether conversations that begin with ``start`` repeat the prompt: its messages, or a text that the user said."""
    if isinstance(prompt, str):
        return prompt.strip() in {message["content"].strip() for message in start if message["role"] == "user"}
    return _messages(prompt, "prompt", where) == [*start]


def _messages(value: Any, name: str, where: str) -> list[dict[str, str]]:
    good = isinstance(value, list) and value
    if not good or not all(
        isinstance(m, Mapping) and is_text(m.get("role")) and is_text(m.get("content")) for m in value
    ):
        raise RecipeError(f"{where}: {name!r} is {value!r:.80}, expected a list of {{role: …, content: …}}.")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _roles(chat: Sequence[Mapping[str, str]]) -> str:
    return "messages of " + ", ".join(message["role"] for message in chat) if chat else "no message"
