"""From rows to token ids and labels: chat templates, label masks, packing, padding.

A label is set where the model should learn: on everything for text, and on the assistant's words for chats and
completions. The mask is not guessed: the prompt is tokenised as it will be when generating, and must be a prefix of
the whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.rows import Row, Rows
from modicum.registry import row_kind
from modicum.types import IGNORED

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from modicum.jobs.data.section import DataSection

Example: TypeAlias = tuple[list[int], list[int]]  # ids and labels


def tokenize(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    *,
    note: Callable[[str], None] | None = None,
) -> datasets.Dataset:
    """Return the rows as a data set in memory, with ``input_ids``, ``labels`` and ``attention_mask``.

    Packed text is cut into blocks of ``max_length``; whatever remains at the end becomes a shorter block. Packed
    chats and completions have ``position_ids`` that start anew with each sample, instead of an attention mask: this
    is how transformers keeps samples of one row from seeing each other.

    Args:
        rows: Rows of :func:`modicum.jobs.data.rows.load_rows`.
        tokenizer: The model's own; its chat template is used where it has one.
        section: ``max_length``, ``packing`` and ``completion_only`` are read.
        note: Told when rows were cut or dropped.

    Raises:
        CheckpointError: The tokenizer cannot express these rows, or nothing is left to learn from.
    """
    return row_kind[rows.kind].facts.tokenize(rows, tokenizer, section, note)


def tokenize_answers(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, note: Callable[[str], None] | None
) -> datasets.Dataset:
    """Learn from the assistant's words; see :func:`encode`."""
    examples = [
        encode(row, tokenizer, completion_only=section.completion_only, where=f"{section.path}, row {index}")
        for index, row in enumerate(rows.rows)
    ]
    return dataset(examples, section, note)


def dataset(
    examples: list[Example], section: DataSection, note: Callable[[str], None] | None = None
) -> datasets.Dataset:
    """Return examples as a data set: cut to ``max_length``, packed where the section says so."""
    short = _cut(examples, section.max_length, note)
    return _packed(short, section) if section.packing else _padded(short, section)


def blocks(ids: list[int], section: DataSection) -> datasets.Dataset:
    """Return one stream of text as blocks of ``max_length``, all of it learned; the last block may be shorter."""
    cut = [ids[start : start + section.max_length] for start in range(0, len(ids), section.max_length)]
    return _padded([(block, list(block)) for block in cut], section)


def text_of(section: DataSection, row: Row, field: str, index: int) -> str:
    """Return the text of a source's row in ``field``, which the section may have renamed.

    Raises:
        RecipeError: The field is missing or no text.
    """
    name = section.fields.of(field)
    value = row.get(name)
    if not isinstance(value, str):
        found = f"is {type(value).__name__}" if name in row else f"is missing (it has {', '.join(sorted(row))})"
        raise RecipeError(f"{section.path}, row {index}: field {name!r} {found}, expected text.")
    return value


def messages_of(row: Row) -> list[dict[str, str]]:
    """Return the conversation before the completion of a prompt."""
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids from which a completion of ``row`` is generated."""
    if tokenizer.chat_template and not row.get("plain"):
        return _ids(tokenizer, _render(tokenizer, messages_of(row), prompt=True))
    if "system" in row:
        raise RecipeError("The tokenizer has no chat template, so it has no system message. Use template: instead.")
    ids: list[int] = tokenizer(row["prompt"], verbose=False)["input_ids"]
    return ids


def encode(row: Row, tokenizer: PreTrainedTokenizerBase, *, completion_only: bool, where: str = "the row") -> Example:
    """Return ids and labels of one chat or completion.

    Args:
        row: With ``messages``, or with ``prompt`` and ``completion``.
        tokenizer: The model's own.
        completion_only: Learn from the assistant's words only.
        where: How errors call the row.

    Raises:
        CheckpointError: The chat template is missing, or does not begin a conversation as it begins its prompt.
    """
    if "messages" not in row and (row.get("plain") or not tokenizer.chat_template):
        start = prompt_ids(row, tokenizer)
        answer = _ids(tokenizer, row["completion"])
        answer = answer if row.get("plain") else ended(answer, tokenizer)
        return start + answer, (([IGNORED] * len(start)) if completion_only else list(start)) + answer
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{where} is a chat, but the tokenizer has no chat template. Use an instruction-tuned model's tokenizer, "
            "or prompt and completion fields."
        )
    messages = row.get("messages") or [*messages_of(row), {"role": "assistant", "content": row["completion"]}]
    ids = _ids(tokenizer, _render(tokenizer, messages))
    if not completion_only:
        return ids, list(ids)
    labels = [IGNORED] * len(ids)
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        raise CheckpointError(f"{where}: no message of the assistant to learn from. Set completion_only: false.")
    for index in spoken:
        before = _ids(tokenizer, _render(tokenizer, messages[:index], prompt=True))
        after = ids if index + 1 == len(messages) else _ids(tokenizer, _render(tokenizer, messages[: index + 1]))
        if ids[: len(after)] != after or after[: len(before)] != before:
            raise CheckpointError(
                f"{where}: with this chat template the prompt before message {index} is not how the whole "
                "conversation begins, so what to learn is unclear. Set completion_only: false, or split the chat."
            )
        # What the template puts after the end of the turn, such as a newline, is never generated.
        end = len(after)
        while tokenizer.eos_token_id in after[len(before) :] and after[end - 1] != tokenizer.eos_token_id:
            end -= 1
        labels[len(before) : end] = ids[len(before) : end]
    return ids, labels


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise CheckpointError(f"The chat template refuses a conversation of {roles}: {error}") from None
    return text


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ``ids`` with the token that ends a text, where the tokenizer has one."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _cut(examples: list[Example], max_length: int, note: Callable[[str], None] | None) -> list[Example]:
    """Cut examples to ``max_length``, and drop examples that then have no label."""
    long = sum(len(ids) > max_length for ids, _ in examples)
    short = [(ids[:max_length], labels[:max_length]) for ids, labels in examples]
    # The first token is never predicted, so its label alone teaches nothing.
    kept = [example for example in short if any(label != IGNORED for label in example[1][1:])]
    if note and (long or len(kept) < len(examples)):
        note(
            f"{long} of {len(examples)} rows are longer than max_length {max_length} and were cut; "
            f"{len(examples) - len(kept)} had nothing left to learn and were dropped."
        )
    return kept


def _padded(examples: list[Example], section: DataSection) -> datasets.Dataset:
    import datasets

    examples = [example for example in examples if len(example[0]) > 1]
    if not examples:
        raise CheckpointError(f"{section.path} has nothing to learn within max_length {section.max_length}. Raise it.")
    return datasets.Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in examples],
            "labels": [labels for _, labels in examples],
            "attention_mask": [[1] * len(ids) for ids, _ in examples],
        }
    )


def _packed(examples: list[Example], section: DataSection) -> datasets.Dataset:
    """Put each sample into the fullest row that still has room."""
    import datasets

    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # free tokens and index of each row, sorted
    for example in examples:
        length = len(example[0])
        found = bisect_left(room, (length, 0))
        if found < len(room):
            free, index = room.pop(found)
        else:
            free, index = section.max_length, len(rows)
            rows.append([])
        rows[index].append(example)
        insort(room, (free - length, index))
    if not rows:
        raise CheckpointError(f"{section.path} has nothing to learn within max_length {section.max_length}. Raise it.")
    return datasets.Dataset.from_dict(
        {
            "input_ids": [list(chain.from_iterable(ids for ids, _ in row)) for row in rows],
            # The first token of a sample would be predicted from the last of the one before.
            "labels": [list(chain.from_iterable([IGNORED, *labels[1:]] for _, labels in row)) for row in rows],
            "position_ids": [list(chain.from_iterable(range(len(ids)) for ids, _ in row)) for row in rows],
        }
    )
