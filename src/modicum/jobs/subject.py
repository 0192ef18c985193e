"""A model on this machine as measures see it: rows in, answers or likelihoods out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import UnsupportedError
from modicum.evaluate.rows import Row, question_of
from modicum.evaluate.subject import Likelihood
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.pairs import Alternatives, PairCollator, encode_alternatives
from modicum.jobs.data.tokens import encode, prompt_ids
from modicum.jobs.data.trial import on_some
from modicum.types import IGNORED
from modicum.vocabulary import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from modicum.evaluate.chat import Judge
    from modicum.evaluate.rows import Rows
    from modicum.jobs.task import Task
    from modicum.jobs.training.lower_blocks import LowerBlocks


@dataclass(frozen=True)
class LocalSubject:
    """A loaded model; see :class:`modicum.evaluate.subject.Subject`.

    Args:
        name: How the recipe calls it.
        model: A causal language model.
        tokenizer: Its own.
        progress: Told which share of a call is done.
        cached_blocks: Lowest blocks whose states are kept for the next model that is the same up to there; see
            :mod:`modicum.jobs.training.lower_blocks`.
        note: Told where this cannot be.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    progress: Callable[[float], None] = lambda _: None
    cached_blocks: int | None = None
    note: Callable[[str], object] = lambda _: None
    _layouts: list[PairCollator] = field(default_factory=list, repr=False)
    _lower: list[LowerBlocks | None] = field(default_factory=list, repr=False)

    def generate(self, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int) -> list[str]:
        """Return the model's greedy answer to the prompt of each row."""
        from modicum.evaluate import generate, stop_tokens

        # A task of the published suite is continued as it is, and its answer is one line.
        line = any(row.get("plain") for row in rows)
        answers = generate(
            self.model,
            self._prompts(rows),
            max_new_tokens=max_new_tokens,
            stop=stop_tokens(self.model, self.tokenizer, line=line),
            pad=pad_id(self.tokenizer),
            batch_size=batch_size,
            progress=lambda done: self.progress(done / len(rows)),
        )
        return [self.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]

    def likelihoods(
        self, rows: Sequence[Row], *, size: int | None = None, stride: int | None = None, batch_size: int = 4
    ) -> list[Likelihood]:
        """Return how probable the model finds each row's ``text``, or its ``completion`` after its ``prompt``."""
        from modicum.evaluate import log_likelihoods, windows

        asked = self._documents(rows)
        documents, contexts = [ids for ids, _ in asked], [context for _, context in asked]
        size = size or max(2, *map(len, documents))
        stride = stride or size - 1
        total = sum(len(windows(len(ids), size=size, stride=stride, context=context)) for ids, context in asked)
        nats = log_likelihoods(
            self.model,
            documents,
            size=size,
            stride=stride,
            pad=pad_id(self.tokenizer),
            batch_size=batch_size,
            contexts=contexts,
            progress=lambda done: self.progress(done / total),
        )
        return [Likelihood(value, len(ids) - context) for value, (ids, context) in zip(nats, asked, strict=True)]

    def alternatives(
        self, rows: Sequence[Sequence[Row]], *, max_length: int | None = None, batch_size: int = 8
    ) -> list[list[Likelihood] | None]:
        """Return how probable the model finds each of several answers to one prompt, which is read once for all."""
        import torch

        from modicum.evaluate.generation import requests
        from modicum.jobs.training.objective import LabelHead
        from modicum.jobs.training.references import answer_log_probabilities

        asked = self._questions(rows)
        long = list(map(_longest, asked))
        kept = self._fitting(long, max_length)
        found: list[list[Likelihood] | None] = [None] * len(asked)
        for numbers, within in requests(self.model, [asked[i].prompt for i in kept]):
            # Rows of one length fill a batch best. Where answers share a prompt, all of them are in one row.
            order = sorted((kept[number] for number in numbers), key=lambda i: (-long[i], i))
            with within, torch.inference_mode():
                collator = self._layout([asked[i] for i in order])
                known = dict(zip(order, self._begun([asked[i] for i in order], collator)))
                head = LabelHead(self.model)
                try:
                    for begin in range(0, len(order), batch_size):
                        chosen = order[begin : begin + batch_size]
                        batch = collator([known[i] for i in chosen])
                        values = iter(answer_log_probabilities(self.model, batch).tolist())
                        for i in chosen:
                            found[i] = [Likelihood(-next(values), len(answer)) for answer in asked[i].answers]
                        self.progress(len(chosen) / len(kept))
                finally:
                    head.detach()
        return found

    def _fitting(self, long: Sequence[int], max_length: int | None) -> list[int]:
        """Return which of so long questions are read; the others are left out, and counted."""
        limit = getattr(self.model.config, "max_position_embeddings", None) or sys.maxsize
        return [place for place, length in enumerate(long) if length <= min(limit, max_length or limit)]

    def _layout(self, asked: Sequence[Alternatives]) -> PairCollator:
        """Return how the model takes several answers to one prompt; it is tried once."""
        from modicum.jobs.training.preferences import beyond_window, layout

        pad = pad_id(self.tokenizer)
        if not asked:
            return PairCollator(pad)
        if beyond_window(self.model.config, asked):
            return PairCollator(pad, shared=False)
        if not self._layouts:
            self._layouts.append(layout(self.model, asked[:1], pad, lambda _: None))
        return self._layouts[0]

    def _begun(self, asked: list[Alternatives], collator: PairCollator) -> list[Alternatives]:
        """Return questions with what the lowest blocks make of them, where these are to be kept and can be."""
        from modicum.jobs.training.lower_blocks import LowerBlocks

        if self.cached_blocks is None or not asked or hasattr(self.model, "requests"):
            return asked
        told = f"{self.name}: cached_blocks: {self.cached_blocks} is off, and passes begin at the tokens"
        try:
            if not self._lower:
                self._lower.append(None)
                self._lower[0] = LowerBlocks(self.model, self.cached_blocks, asked[0], collator)
            if (lower := self._lower[0]) is not None and lower.collator == collator:
                return lower.under(asked)
        except UnsupportedError as error:
            self.note(f"{told}: {error}.")
        return asked

    def rehearsed(self, task: Task, rows: Rows, **given: Any) -> None:
        """Refuse what a task would refuse before the model computes anything, which it does not need its weights for.

        Args:
            task: The task, which is asked up to the first question to the model.
            rows: Its rows, of which some are encoded.
            given: What the job supplies to measures.

        Raises:
            ModicumError: The rows cannot be encoded, or are longer than the model reads.
        """

        def stop(_: object) -> Any:
            raise _RehearsedError

        given |= {"reference_of": stop, "judge_of": stop}
        with suppress(_RehearsedError):
            on_some(rows, lambda some: task.ask(task.measure.function, some, _Rehearsal(self), **given))

    def _prompts(self, rows: Sequence[Row]) -> list[list[int]]:
        return [prompt_ids(row, self.tokenizer) for row in rows]

    def _documents(self, rows: Sequence[Row]) -> list[tuple[list[int], int]]:
        return [self._document(row["text"]) if "text" in row else self._completion(row) for row in rows]

    def _questions(self, rows: Sequence[Sequence[Row]]) -> list[Alternatives]:
        found = [
            encode_alternatives(row, self.tokenizer, f"question {index}: {question_of(row[0])!r:.60}")
            for index, row in enumerate(rows)
        ]
        check_ids(self.model, (ids for one in found for ids in (one.prompt, *one.answers)))
        return found

    def _document(self, text: str) -> tuple[list[int], int]:
        """Return the ids of a text after one token of context, so that its own first token is scored too."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        start = self.tokenizer.bos_token_id
        return [pad_id(self.tokenizer) if start is None else start, *ids], 1

    def _completion(self, row: Row) -> tuple[list[int], int]:
        """Return prompt and completion as they are learned from, and how many of the ids are the prompt's."""
        ids, labels = encode(row, self.tokenizer, completion_only=True)
        context = next((i for i, label in enumerate(labels) if label != IGNORED), len(ids))
        # A chat template may put a line feed behind the answer, which is no part of it.
        end = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != IGNORED), len(ids))
        return ids[:end], context


def _longest(asked: Alternatives) -> int:
    return len(asked.prompt) + max(map(len, asked.answers))


class _RehearsedError(Exception):
    """Raised in the place of the model's word."""


class _Rehearsal:
    """Stands for a model of which only the configuration is known: encodes what it is asked, and ends there."""

    def __init__(self, subject: LocalSubject) -> None:
        self._of, self.tokenizer = subject, subject.tokenizer

    @property
    def model(self) -> Any:
        raise _RehearsedError

    def generate(self, rows: Sequence[Row], *, max_new_tokens: int, **_: Any) -> list[str]:
        from modicum.evaluate.generation import check_room

        prompts = self._of._prompts(rows)
        pad_id(self.tokenizer)
        check_room(self._of.model, prompts, max_new_tokens)
        check_ids(self._of.model, prompts)
        raise _RehearsedError

    def likelihoods(self, rows: Sequence[Row], *, size: int | None = None, **_: Any) -> list[Likelihood]:
        from modicum.evaluate.likelihood import check_window

        documents = self._of._documents(rows)
        pad_id(self.tokenizer)
        check_window(self._of.model, size or max(len(ids) for ids, _ in documents))
        check_ids(self._of.model, (ids for ids, _ in documents))
        raise _RehearsedError

    def alternatives(
        self, rows: Sequence[Sequence[Row]], *, max_length: int | None = None, **_: Any
    ) -> list[list[Likelihood] | None]:
        pad_id(self.tokenizer)
        if self._of._fitting(list(map(_longest, self._of._questions(rows))), max_length):
            raise _RehearsedError
        return [None] * len(rows)


class Reference:
    """What another model thinks of the same questions: it is loaded when they are new, and not kept.

    Args:
        load: Loads the model.
    """

    def __init__(self, load: Callable[[], LocalSubject]) -> None:
        self._load, self._known = load, dict[str, list[list[Likelihood] | None]]()

    def alternatives(
        self, rows: Sequence[Sequence[Row]], *, max_length: int | None = None, batch_size: int = 8
    ) -> list[list[Likelihood] | None]:
        """Return what :meth:`LocalSubject.alternatives` does, computed once for each list of questions."""
        key = json.dumps([max_length, rows])
        if key not in self._known:
            self._known[key] = self._load().alternatives(rows, max_length=max_length, batch_size=batch_size)
        return self._known[key]


def supplied(load: Callable[[str], LocalSubject]) -> dict[str, Any]:
    """Return what measures may ask beside the model: another model, and a judge; each is opened once.

    Args:
        load: Loads another model. None stays in memory: its answers are kept instead.
    """
    references: dict[str, Reference] = {}
    judges: dict[str, tuple[Judge, Mapping[str, Any]]] = {}

    def reference_of(reference: str) -> Reference:
        return references.setdefault(reference, Reference(lambda: load(reference)))

    def judge_of(value: Any) -> tuple[Judge, Mapping[str, Any]]:
        from modicum.jobs.chat.targets import any_judge, open_judge

        key = json.dumps(value, sort_keys=True)
        if key not in judges:
            judges[key] = open_judge(any_judge(value))
        return judges[key]

    return {"reference_of": reference_of, "judge_of": judge_of}
