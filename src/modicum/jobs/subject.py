"""A model on this machine as measures see it: rows in, answers or likelihoods out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from modicum.evaluate.rows import Row
from modicum.evaluate.subject import Likelihood
from modicum.jobs.data.collators import pad_id
from modicum.jobs.data.tokens import encode, prompt_ids
from modicum.types import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LocalSubject:
    """A loaded model; see :class:`modicum.evaluate.subject.Subject`.

    Args:
        name: How the recipe calls it.
        model: A causal language model.
        tokenizer: Its own.
        progress: Told which share of a call is done.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    progress: Callable[[float], None] = lambda _: None

    def generate(self, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int) -> list[str]:
        """Return the model's greedy answer to the prompt of each row."""
        from modicum.evaluate import generate, stop_tokens

        # A task of the published suite is continued as it is, and its answer is one line.
        line = any(row.get("plain") for row in rows)
        answers = generate(
            self.model,
            [prompt_ids(row, self.tokenizer) for row in rows],
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

        asked = [self._document(row["text"]) if "text" in row else self._completion(row) for row in rows]
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
