"""Pairs as tokens, and their batches: both answers follow one copy of the prompt and do not see each other.

A row [prompt | chosen | rejected] in which the answers attend to the prompt and to themselves, and in which both begin
at the prompt's end, gives the log-probabilities of two rows of their own, for P + A + A tokens in place of 2P + A + A.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from modicum.errors import CheckpointError
from modicum.evaluate.rows import answered
from modicum.jobs.data.bad_rows import each, whole
from modicum.jobs.data.kinds.preference import SIDES
from modicum.jobs.data.tokens import encode
from modicum.types import IGNORED

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from modicum.evaluate.rows import Row, Rows
    from modicum.jobs.data.section import DataSection

Tokens: TypeAlias = tuple[int, ...]


class Lower(NamedTuple):
    """What leaves the lowest blocks of a model for the tokens of a pair; see :mod:`modicum.jobs.training.lower_blocks`.

    Attributes:
        blocks: How many they are.
        states: Of the tokens as :class:`PairCollator` lays the pair out, (tokens, hidden size).
    """

    blocks: int
    states: Tensor


@dataclass(frozen=True)
class Pair:
    """A prompt with two answers as tokens, their log-probabilities under the reference, and of which dimension."""

    prompt: Tokens
    chosen: Tokens
    rejected: Tokens
    reference: tuple[float, float] = (0.0, 0.0)
    dimension: str = ""
    lower: Lower | None = field(default=None, compare=False, repr=False)

    @property
    def answers(self) -> tuple[Tokens, Tokens]:
        """The chosen answer and the rejected one."""
        return self.chosen, self.rejected


def encode_pairs(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, section: DataSection, *, note: Callable[[str], None]
) -> list[Pair]:
    """Return the rows as pairs of tokens, without those of which an answer would not fit into ``max_length``.

    Args:
        rows: Of the kind ``preference``.
        tokenizer: The model's own.
        section: ``max_length`` and ``on_bad_row`` are read.
        note: Told how many pairs were left out.

    Raises:
        CheckpointError: The rows are no pairs, or none fits, or prompt and answers cannot be told apart.
    """
    if rows.kind != "preference":
        raise CheckpointError(
            f"{section.path} holds {rows.kind} rows, expected pairs: a prompt with chosen and rejected answers. Name "
            "your fields: fields: {chosen: …, rejected: …}."
        )
    pairs = each(
        rows.rows, lambda index, row: encode_pair(row, tokenizer, f"{section.path}, row {index}"), section, note
    )
    return whole(pairs, lambda pair: len(pair.prompt) + max(map(len, pair.answers)), section, note, noun="pairs")


def encode_pair(row: Row, tokenizer: PreTrainedTokenizerBase, where: str) -> Pair:
    """Return the tokens of one pair; the answers end as they do when they are generated.

    Raises:
        CheckpointError: The tokens before both answers differ, or both answers are the same tokens.
    """
    found = encode_alternatives([answered(row, row[side]) for side in SIDES], tokenizer, where)
    chosen, rejected = found.answers
    if chosen == rejected:
        raise CheckpointError(f"{where}: chosen and rejected are the same tokens, so there is nothing to prefer.")
    return Pair(found.prompt, chosen, rejected, dimension=row.get("dimension", ""))


def encode_alternatives(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, where: str) -> Alternatives:
    """Return the tokens of one prompt with several answers, each of which ends as it does when it is generated.

    Args:
        rows: The prompt with each of the answers, as chats or completions.
        tokenizer: The model's own.
        where: Names them in errors.

    Raises:
        CheckpointError: The tokens before the answers differ.
    """
    prompts, answers = [], []
    for row in rows:
        ids, labels = encode(row, tokenizer, completion_only=True, where=where)
        end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
        start = max((place for place in range(end) if labels[place] == IGNORED), default=-1) + 1
        prompts.append(tuple(ids[:start]))
        answers.append(tuple(ids[start:end]))
    if len({*prompts}) > 1 or not prompts[0]:
        raise CheckpointError(f"{where}: the tokens before the answers differ, so they share no prompt.")
    return Alternatives(prompts[0], tuple(answers))


@dataclass(frozen=True)
class Alternatives:
    """A prompt with any number of answers as tokens, of which nothing is known yet."""

    prompt: Tokens
    answers: tuple[Tokens, ...]
    reference: tuple[float, ...] = ()
    lower: Lower | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class PairCollator:
    """Make batches of pairs, their log-probabilities to be read where an answer's tokens are predicted.

    Args:
        pad: Token to fill rows with.
        shared: Whether all answers follow one copy of the prompt; else each has a row of its own.
        mask: Type of the mask of tokens by tokens of shared rows: boolean, or a type of numbers that are added.
    """

    pad: int
    shared: bool = True
    mask: torch.dtype | None = None

    def __call__(self, pairs: Sequence[Pair | Alternatives]) -> dict[str, Any]:
        """Return the inputs of the model and what :func:`~modicum.jobs.training.references.log_probabilities` reads.

        The first entry has one row for each pair, which is how the Trainer counts a batch.
        """
        import torch

        segments = list(chain.from_iterable(map(self._segments, pairs)))
        rows = (
            _fitted([len(segment.ids) for segment in segments]) if self.shared else [[i] for i in range(len(segments))]
        )
        width = max(sum(len(segments[i].ids) for i in row) for row in rows)
        ids, places, owners = (torch.full((len(rows), width), fill) for fill in (self.pad, 0, -1))
        copies = torch.zeros_like(ids)
        reads: list[list[list[int]]] = [[] for _ in segments]
        spots: list[list[int]] = [[] for _ in segments]
        for number, row in enumerate(rows):
            at = 0
            for index in row:
                segment = segments[index]
                here = slice(at, at + len(segment.ids))
                for table, part in ((ids, segment.ids), (places, segment.places), (copies, segment.copies)):
                    table[number, here] = torch.tensor(part)
                owners[number, here] = index
                spots[index] = [number * width + place for place in range(here.start, here.stop)]
                reads[index] = [[number * width + at + place for place in answer] for answer in segment.reads]
                at = here.stop
        mask = self._mask(owners, copies) if self.shared else (owners >= 0).long()
        return {
            "labels": torch.arange(len(pairs)),
            "reference": torch.tensor([pair.reference for pair in pairs], dtype=torch.float32),
            "input_ids": ids,
            "position_ids": places,
            "attention_mask": mask,
            "reads": torch.tensor(list(chain.from_iterable(chain.from_iterable(reads)))),
            "targets": torch.tensor(list(chain.from_iterable(chain.from_iterable(pair.answers for pair in pairs)))),
            "counts": [len(answer) for pair in pairs for answer in pair.answers],
            **_above(pairs, torch.tensor(list(chain.from_iterable(spots))), ids.shape),
        }

    def _segments(self, pair: Pair | Alternatives) -> list[_Segment]:
        """Lay a pair out. An answer's last token predicts nothing and is not read; the prompt's last predicts all."""
        start = len(pair.prompt)
        bodies = [list(answer[:-1]) for answer in pair.answers]
        own = [list(range(start, start + len(body))) for body in bodies]
        if not self.shared:
            return [
                _Segment(
                    [*pair.prompt, *body], list(range(start + len(body))), [1] * (start + len(body)), [[start - 1, *at]]
                )
                for body, at in zip(bodies, own)
            ]
        ends = list(accumulate(map(len, bodies), initial=start))
        return [
            _Segment(
                [*pair.prompt, *chain(*bodies)],
                [*range(start), *chain(*own)],
                [0] * start + [number for number, body in enumerate(bodies, 1) for _ in body],
                [[start - 1, *range(at, end)] for at, end in pairwise(ends)],
            )
        ]

    def _mask(self, owners: Tensor, copies: Tensor) -> Tensor:
        """Let a token see those before it of its own pair, in the prompt or in its own answer."""
        import torch

        same = owners[:, :, None] == owners[:, None, :]
        visible = (copies[:, None, :] == 0) | (copies[:, None, :] == copies[:, :, None])
        seen = (same & visible).tril()[:, None]
        if self.mask is None or self.mask == torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=self.mask).masked_fill_(~seen, torch.finfo(self.mask).min)


def _above(pairs: Sequence[Pair | Alternatives], spots: Tensor, shape: Sequence[int]) -> dict[str, Any]:
    """Return where the pairs' tokens lie, and the states with which a pass begins above the lowest blocks."""
    import torch

    known = [pair.lower for pair in pairs if pair.lower is not None]
    if len(known) < len(pairs):
        return {"spots": spots}
    states = known[0].states.new_zeros(shape[0] * shape[1], known[0].states.shape[1])
    states[spots] = torch.cat([lower.states for lower in known])
    return {"spots": spots, "states": states.view(*shape, -1), "below": known[0].blocks}


@dataclass(frozen=True)
class _Segment:
    """Tokens that stand together in a row, and for each answer in them the places where it is predicted."""

    ids: list[int]
    places: list[int]
    copies: list[int]
    reads: list[list[int]]


def _fitted(lengths: Sequence[int]) -> list[list[int]]:
    """Return rows, as long as the longest segment, into which the segments fit; the longest ones are placed first."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        found = bisect_left(room, (lengths[index], 0))
        free, number = room.pop(found) if found < len(room) else (max(lengths), len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append(index)
        insort(room, (free - lengths[index], number))
    return rows


def with_reference(pair: Pair, reference: tuple[float, float]) -> Pair:
    """Return the pair with the log-probabilities of its answers under the reference."""
    return replace(pair, reference=reference)
