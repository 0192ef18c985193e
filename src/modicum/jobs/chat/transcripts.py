"""Answers of an earlier run that kept them, so that another judge can read them without new samples."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from modicum.borders import expanded
from modicum.errors import CheckpointError
from modicum.evaluate.chat import ChatModel, ChatRequest, ChatResult, Choice, arriving
from modicum.jobs.chat.cache import read_lines_of

VERDICTS = "verdicts"  # folder of a run of job: attack, with a file for each target


class Transcribed:
    """Answer from transcripts, and ask the model only for what they lack.

    Args:
        name: The model's, under which the transcripts were made; it belongs to the addresses.
        known: Answers by address, of :func:`read_transcripts`.
        opened: Opens the model when it is first needed.

    Attributes:
        drawn: Answers that were asked for so far.
    """

    def __init__(self, name: str, known: dict[str, Choice], opened: Callable[[], ChatModel]) -> None:
        self.name, self.known, self._open, self.drawn = name, known, opened, 0
        self._model: ChatModel | None = None
        self.caps: frozenset[str] = frozenset({"n", "seed", "sampling"})  # whoever made the transcripts was probed

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request."""
        found = dict(pair for part in self.arriving(requests) for pair in part)
        return [found[index] for index in range(len(requests))]

    def arriving(self, requests: Sequence[ChatRequest]) -> Iterator[list[tuple[int, ChatResult]]]:
        """Yield results with the numbers of their requests: what is known at once, the others as they come."""
        keys = [[request.key(self.name, index=i) for i in range(request.params.n)] for request in requests]
        lacking = [i for i, row in enumerate(keys) if not all(key in self.known for key in row)]
        told = sorted({*range(len(requests))} - {*lacking})
        if told:
            yield [(i, ChatResult(tuple(self.known[key] for key in keys[i]))) for i in told]
        if lacking:
            self._model = self._model or self._open()
            self.drawn += sum(requests[i].params.n for i in lacking)
            for part in arriving(self._model, [requests[i] for i in lacking]):
                yield [(lacking[index], result) for index, result in part]


def transcript_files(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the files with judged answers of a run.

    Raises:
        CheckpointError: There are none.
    """
    found = sorted((expanded(folder) / VERDICTS).glob("*.jsonl"))
    if not found:
        raise CheckpointError(f"{folder} has no {VERDICTS}/*.jsonl, expected the folder of a run of job: attack.")
    return found


def read_transcripts(folder: str | os.PathLike[str]) -> dict[str, Choice]:
    """Return the answers of a run by their address, whoever judged them.

    Raises:
        CheckpointError: The run kept no words, or its files hold something else.
    """
    known: dict[str, Choice] = {}
    for path in transcript_files(folder):
        for entry in read_lines_of(path):
            if "text" not in entry:
                continue
            try:
                address = str(entry["key"]).partition("/")[0]
                said = Choice(entry["text"], entry["reasoning"], entry["finish"])
                if not isinstance(said.text, str) or not isinstance(said.reasoning, str | None):
                    raise TypeError
                known[address] = said
            except (KeyError, TypeError):
                raise CheckpointError(f"{path} holds a line that is no judged answer. Move the file away.") from None
    if not known:
        raise CheckpointError(
            f"{folder} kept no words of its answers, which cannot be judged again. Run it with save_completions: true."
        )
    return known
