"""The model that is measured, as measures see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from modicum.evaluate.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Result: TypeAlias = dict[str, Any]  # the measurements of one row, which JSON can hold


class Likelihood(NamedTuple):
    """How probable a model finds a text.

    Attributes:
        nats: Negative log-likelihood.
        tokens: Over how many tokens.
    """

    nats: float
    tokens: int


class Subject(Protocol):
    """A model and its tokenizer, and what most measures ask of them. The job that measures makes it."""

    @property
    def name(self) -> str: ...
    @property
    def model(self) -> PreTrainedModel: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...

    def generate(self, rows: Sequence[Row], *, max_new_tokens: int, batch_size: int) -> list[str]:
        """Return the model's greedy answer to the prompt of each row."""
        ...

    def likelihoods(
        self, rows: Sequence[Row], *, size: int | None = None, stride: int | None = None, batch_size: int = 4
    ) -> list[Likelihood]:
        """Return how probable the model finds each row's ``text``, or its ``completion`` after its ``prompt``.

        Args:
            rows: Documents, or prompts with completions.
            size: Tokens of a window; each row is read in one when not given.
            stride: Tokens by which a window moves on; windows of documents do not overlap when not given.
            batch_size: Windows at a time.
        """
        ...

    def alternatives(
        self, rows: Sequence[Sequence[Row]], *, max_length: int | None = None, batch_size: int = 8
    ) -> list[list[Likelihood] | None]:
        """Return how probable the model finds each of several answers to one prompt.

        Args:
            rows: For each question, its prompt with each of the answers, as chats or completions.
            max_length: A question of which an answer ends after so many tokens is not read.
            batch_size: Questions at a time.

        Returns:
            For each question the likelihoods of its answers, ``None`` where it was not read.
        """
        ...
