"""From rows to token ids and labels: chat templates, label masks, packing, padding.

A label is set where the model should learn: on everything for text, and on the assistant's words for chats and
completions. The mask is not guessed: the prompt is tokenised as it will be when generating, and the answer goes on from
there.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import TYPE_CHECKING, TypeAlias

from modicum.errors import CheckpointError, RecipeError, listed
from modicum.evaluate.rows import Row, Rows
from modicum.jobs.data import chat_template
from modicum.jobs.data.bad_rows import each, whole
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
        section: ``max_length``, ``long_rows``, ``packing`` and ``completion_only`` are read.
        note: Told when rows were cut, dropped or left out, and with which token answers end.

    Raises:
        CheckpointError: The tokenizer cannot express these rows, or nothing is left to learn from.
    """
    return row_kind[rows.kind].facts.tokenize(rows, tokenizer, section, note)


def tokenize_answers(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, note: Callable[[str], None] | None
) -> datasets.Dataset:
    """Learn from the assistant's words; see :func:`encode`."""

    def make(index: int, row: Row) -> Example:
        where = f"{section.path}, row {index}"
        return encode(row, tokenizer, completion_only=section.completion_only, where=where)

    examples = each(rows.rows, make, section, note)
    made = dataset(examples, section, note)
    if note and not any(row.get("plain") for row in rows.rows):  # these end with their line
        note(f"{section.path}: {endings(examples, tokenizer)}")
    return made


def endings(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> str:
    """Say with which token the answers end, and whether it is learned."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    special.update(tokenizer.all_special_ids)
    counts = Counter(_ending(labels, tokenizer, special) for _, labels in examples)
    ends = [end for end, _ in counts.most_common() if end is not None]
    if not ends:
        return (
            "nothing ends an answer (no end-of-turn token in the chat template, or no eos_token of the tokenizer), so "
            "the model does not learn to stop. Let the template write one after each answer."
        )
    named = " or ".join(repr(tokenizer.convert_ids_to_tokens(end)) for end in ends)
    without = f", but in {counts[None]} of {len(examples)} rows nothing does" if counts[None] else ""
    other = "" if tokenizer.eos_token_id in ends else f" The tokenizer's eos_token is {tokenizer.eos_token!r}."
    return f"answers end with {named}, which is learned{without}.{other}"


def _ending(labels: Sequence[int], tokenizer: PreTrainedTokenizerBase, special: Collection[int]) -> int | None:
    """Return the special token that is learned last, white space aside; ``None`` where a word is."""
    for label in reversed(labels):
        if label in special:
            return label
        if label != IGNORED and tokenizer.decode([label]).strip():
            return None
    return None


NO_TEMPLATE = (
    "the tokenizer has no chat template. Use an instruction-tuned model's tokenizer, or prompt and completion fields"
)


def dataset(
    examples: list[Example], section: DataSection, note: Callable[[str], None] | None = None
) -> datasets.Dataset:
    """Return examples as a data set: cut to ``max_length`` or left out, packed where the section says so."""
    if section.long_rows == "drop":
        examples = whole(examples, lambda example: len(example[0]), section, note or warnings.warn, noun="rows")
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
    if isinstance(value, str) and not is_text(value):
        raise RecipeError(f"{section.path}, row {index}: field {name!r} holds half a Unicode character (a surrogate).")
    if not isinstance(value, str):
        found = f"is {type(value).__name__}" if name in row else f"is missing (it has {listed(row)})"
        raise RecipeError(f"{section.path}, row {index}: field {name!r} {found}, expected text.")
    return value


def is_text(value: object) -> bool:
    """Whether a value is text that a tokenizer takes: JSON can hold one half of a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def messages_of(row: Row) -> list[dict[str, str]]:
    """Return the conversation before the completion of a prompt, or before the last answer of a chat."""
    if "messages" in row:
        *before, last = row["messages"]
        return before if last["role"] == "assistant" else [*before, last]
    system = [{"role": "system", "content": row["system"]}] if "system" in row else []
    return [*system, {"role": "user", "content": row["prompt"]}]


def prompt_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids from which a completion of ``row``, or the last answer of its chat, is generated.

    Raises:
        CheckpointError: It needs a chat template, and the tokenizer has none.
    """
    if "messages" in row and not tokenizer.chat_template:
        raise CheckpointError(f"A row is a chat, but {NO_TEMPLATE}.")
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
        answer = continued(tokenizer, row["completion"])
        answer = answer if row.get("plain") else ended(answer, tokenizer)
        return start + answer, (([IGNORED] * len(start)) if completion_only else list(start)) + answer
    if not tokenizer.chat_template:
        raise CheckpointError(f"{where} is a chat, but {NO_TEMPLATE}.")
    # Of one text that was cut in two, the white space between is no part of what is said.
    said = row["completion"].lstrip() if row.get("joined") else row.get("completion")
    messages = row.get("messages") or [*messages_of(row), {"role": "assistant", "content": said}]
    spoken = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if completion_only and not spoken:
        raise CheckpointError(f"{where}: no message of the assistant to learn from. Set completion_only: false.")
    ids, turns = _turns(messages, spoken, tokenizer, where)
    if not completion_only:
        return ids, list(ids)  # where a turn begins does not matter then
    if len(turns) < len(spoken):
        raise CheckpointError(
            f"{where}: with this chat template the prompt before message {spoken[len(turns)]} is not how the whole "
            "conversation begins, so what to learn is unclear. Set completion_only: false, or split the chat."
        )
    labels = [IGNORED] * len(ids)
    for begin, end in turns:
        turn = learned_turn(ids[begin:end], tokenizer)
        labels[begin : begin + len(turn)] = turn
    return ids, labels


def learned_turn(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what is learned of a turn: what the template puts after its end, such as a newline, is never generated."""
    end = tokenizer.eos_token_id
    return ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids


def _turns(
    messages: Sequence[dict[str, str]], spoken: Sequence[int], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return the ids of a conversation, and where each turn of the assistant lies in them.

    A turn begins where its prompt ends. Where the answer's first letters would join the prompt's last ones into one
    token (two line feeds, a space and a word), the text is cut there before it is tokenised: a model that generates
    gets the prompt's tokens by themselves.

    Returns:
        Ids and turns; fewer turns than ``spoken`` where the text of a prompt is not how the conversation begins.

    Raises:
        CheckpointError: The template leaves out words of the assistant.
    """
    text = _render(tokenizer, messages)
    ids = _ids(tokenizer, text)
    for at in spoken:
        _whole(messages[at]["content"], text, f"{where}, message {at}")
    try:
        ends = [text if at + 1 == len(messages) else _render(tokenizer, messages[: at + 1]) for at in spoken]
        texts = [(_render(tokenizer, messages[:at], prompt=True), end) for at, end in zip(spoken, ends)]
    except CheckpointError:  # the template takes the whole, but not its beginning
        return ids, []
    for at, (prompt, answered) in zip(spoken, texts):
        if answered.startswith(prompt):  # an answer may repeat words of the question, so its own turn must hold them
            _whole(messages[at]["content"], answered[len(prompt) :], f"{where}, message {at}", opened=prompt)
    turns: list[tuple[int, int]] = []
    for prompt, answered in texts:
        before, after = _ids(tokenizer, prompt), ids if answered is text else _ids(tokenizer, answered)
        if ids[: len(after)] != after or after[: len(before)] != before:
            break
        turns.append((len(before), len(after)))
    if len(turns) == len(spoken):
        return ids, turns
    pieces: list[int] = []
    cut, turns = 0, []
    for prompt, answered in texts:
        if len(prompt) < cut or not answered.startswith(prompt) or not text.startswith(answered):
            return ids, turns
        pieces += (continued if cut else _ids)(tokenizer, text[cut : len(prompt)])
        start, cut = len(pieces), len(answered)
        pieces += continued(tokenizer, text[len(prompt) : cut])
        turns.append((start, len(pieces)))
    return pieces + continued(tokenizer, text[cut:]), turns


def _whole(said: str, rendered: str, where: str, *, opened: str = "") -> None:
    """Refuse a chat template that leaves out some of an answer, as those of reasoning models do with reasoning.

    Training would go on without a word, on what is left of the answer.

    Args:
        said: The answer.
        rendered: What the template made of it; white space may differ.
        where: How the error calls the answer.
        opened: The prompt before it, which may already hold the answer's opening tag.
    """
    words, found = "".join(said.split()), "".join(rendered.split())
    if words in found or (opened and words in "".join(opened.split())[-len(words) :] + found):
        return
    kept = next((size for size in range(len(words), 0, -1) if words[-size:] in found), 0)
    raise CheckpointError(
        f"{where}: of an answer of {len(words)} letters the chat template keeps "
        f"{'the last ' + str(kept) if kept else 'none'}, so the rest would not be learned. Templates of reasoning "
        "models drop what stands before the closing tag of their reasoning: use a template that keeps the whole answer."
    )


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, prompt: bool = False) -> str:
    return chat_template.apply(tokenizer, messages, prompt=prompt)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def continued(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that goes on another, without the space that SentencePiece puts before a first word."""
    ids = _ids(tokenizer, text)
    if ids and tokenizer.convert_ids_to_tokens(ids[0]) == "▁" and not text.startswith((" ", "▁")):
        return ids[1:]
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
        instead = " data.long_rows: drop leaves them out." if long else ""
        note(
            f"{long} of {len(examples)} rows are longer than max_length {max_length} and were cut; "
            f"{len(examples) - len(kept)} had nothing left to learn and were dropped.{instead}"
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
