"""From rows to token ids and labels: chat templates, label masks, packing, padding.

A label is set where the model should learn: on everything for text, and on what the assistant says for chats and
completions. The mask is not guessed: the prompt is tokenised as it will be when generating, and must be a prefix of
the whole.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from modicum.errors import CheckpointError, RecipeError

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

    from modicum.jobs.data.section import DataSection, Row, Rows

IGNORED = -100  # the label that the loss leaves out
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
        rows: What :func:`modicum.jobs.data.rows.load_rows` gave.
        tokenizer: The model's own; its chat template is used where it has one.
        section: ``max_length``, ``packing`` and ``completion_only`` are read.
        note: Told when rows were cut or dropped.

    Raises:
        CheckpointError: The tokenizer cannot express these rows, or nothing is left to learn from.
    """
    if rows.kind == "text":
        examples = [(ids, list(ids)) for ids in _documents(rows.rows, tokenizer)]
    else:
        examples = [
            encode(row, tokenizer, completion_only=section.completion_only, where=f"{section.path}, row {index}")
            for index, row in enumerate(rows.rows)
        ]
    if rows.kind == "text" and section.packing:
        ids = list(chain.from_iterable(ids for ids, _ in examples))
        blocks = [ids[start : start + section.max_length] for start in range(0, len(ids), section.max_length)]
        return _dataset([(block, list(block)) for block in blocks], section)
    examples = _cut(examples, section.max_length, note)
    if section.packing:
        return _packed(examples, section)
    return _dataset(examples, section)


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
        completion_only: Learn from what the assistant says only.
        where: How errors call the row.

    Raises:
        CheckpointError: The chat template is missing, or does not begin a conversation as it begins its prompt.
    """
    if "messages" not in row and (row.get("plain") or not tokenizer.chat_template):
        start = prompt_ids(row, tokenizer)
        answer = _ids(tokenizer, row["completion"])
        answer = answer if row.get("plain") else _ended(answer, tokenizer)
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


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _documents(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Iterable[list[int]]:
    for ids in tokenizer([row["text"] for row in rows], verbose=False)["input_ids"]:
        yield _ended(ids, tokenizer)


def _cut(examples: list[Example], max_length: int, note: Callable[[str], None] | None) -> list[Example]:
    """Shorten what is too long, and drop what then holds no label."""
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


def _dataset(examples: list[Example], section: DataSection) -> datasets.Dataset:
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


@dataclass(frozen=True)
class PaddingCollator:
    """Pad examples on the right to the longest of the batch; padding has no label.

    Args:
        tokenizer: Gives the padding token, or failing that the end-of-text token.
        multiple: Round the length up to a multiple of this, which some accelerators like.
    """

    tokenizer: PreTrainedTokenizerBase
    multiple: int = 1

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the batch: tensors, and for packed rows the order not to make a cache."""
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        length = -(-length // self.multiple) * self.multiple
        fill = {"input_ids": pad_id(self.tokenizer), "labels": IGNORED, "attention_mask": 0}
        batch: dict[str, Any] = {}
        for key in examples[0]:
            padded = []
            for example in examples:
                missing = length - len(example[key])
                # Padding of a packed row is one more sample, so that no real one sees it.
                tail = list(range(missing)) if key == "position_ids" else [fill[key]] * missing
                padded.append([*example[key], *tail])
            batch[key] = torch.tensor(padded)
        # With a cache, transformers takes the samples of a packed row for one, and they see each other.
        return batch | {"use_cache": False} if "position_ids" in batch else batch


def collate(tokenizer: PreTrainedTokenizerBase) -> PaddingCollator:
    """Return the collator for what :func:`tokenize` gives.

    Raises:
        CheckpointError: The tokenizer has neither a padding nor an end-of-text token.
    """
    pad_id(tokenizer)
    return PaddingCollator(tokenizer)


@dataclass(frozen=True)
class LabelledLogits:
    """Ask the model for logits only where a label follows.

    The output layer is the widest of a small model, and with labels on the completion only most of its work is thrown
    away: a fifth of a training step for SmolLM2-135M, and most of its memory. ``logits_to_keep`` and ``shift_labels``
    are arguments that transformers' causal models and their loss take.

    Args:
        inner: The collator that makes the batch.
    """

    inner: Callable[[Sequence[dict[str, list[int]]]], dict[str, Any]]

    def __call__(self, examples: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the batch with the positions to predict from and their labels."""
        batch = self.inner(examples)
        targets = batch["labels"][:, 1:]
        positions = (targets != IGNORED).any(dim=0).nonzero().flatten()
        return {**batch, "logits_to_keep": positions, "shift_labels": targets[:, positions]}


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id to pad with."""
    for found in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if found is not None:
            return int(found)
    raise CheckpointError("The tokenizer has neither a padding nor an end-of-text token. Set pad_token in its config.")
