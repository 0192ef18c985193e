"""Answers on disk, addressed by what they depend on: nothing is drawn twice, and a study can be replayed.

The file has one line of JSON for each sample and is only ever appended to. A line that was cut by a kill is left out
and drawn again. Each sample has an address of its own, so that the first four of eight samples are those of four.
"""

from __future__ import annotations

import base64
import json
import os
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modicum.borders import loads
from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.chat import ChatModel, ChatRequest, ChatResult, Choice, arriving, fingerprint
from modicum.knobs import guarded
from modicum.stored import end_last_line
from modicum.types import PositiveInt

LONGEST = 64 << 20  # bytes of an answer


@guarded
class Cached:
    """Ask a model for what is not stored yet, and store it as soon as it comes.

    Args:
        inner: The model.
        path: The file; its folder is made.
        revision: What else the answers depend on, such as the hash of the weights.
        batch: Samples between two writes, of a model that does not hand over each as it comes.
        packed: Compress the answers, so that nothing unsafe that a model wrote lies in a run folder in clear. This is
            no encryption.
        check: Called before an answer is kept; what it raises, as of a model that changed, keeps it out.

    Example:
        >>> import tempfile
        >>> from modicum.evaluate.chat import user
        >>> from modicum.jobs.chat.scripted import Scripted
        >>> echo = Scripted(lambda request: "yes")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = Cached(echo, f"{folder}/cache.jsonl")
        ...     _ = [model.generate([ChatRequest(user("hi"))]) for _ in range(3)]
        >>> echo.calls
        1
    """

    def __init__(
        self,
        inner: ChatModel,
        path: str | os.PathLike[str],
        *,
        revision: str = "",
        batch: PositiveInt = 64,
        packed: bool = False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.inner, self.path, self.revision, self.batch = inner, Path(path), revision, batch
        self.packed, self._check = packed, check
        self.path.parent.mkdir(parents=True, exist_ok=True)
        end_last_line(self.path)
        self.known = read_samples(self.path)
        self.lock = threading.Lock()

    @property
    def name(self) -> str:
        """The inner model's."""
        return self.inner.name

    @property
    def caps(self) -> frozenset[str]:
        """The inner model's."""
        return self.inner.caps

    def missing(self, requests: Sequence[ChatRequest]) -> int:
        """Return how many samples would have to be drawn."""
        return sum(self._key(r, i) not in self.known for r in requests for i in range(r.params.n))

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request; samples are drawn one by one under names of their own, in batches."""
        wanted: dict[str, ChatRequest] = {}
        for request in requests:
            for index in range(request.params.n):
                key = self._key(request, index)
                if key not in self.known:
                    wanted.setdefault(key, request.single(index))
        errors: dict[str, str] = {}
        keys = list(wanted)
        for part in arriving(self.inner, list(wanted.values()), batch=self.batch):
            for index, result in part:
                if result.error is not None or not result.choices:
                    errors[keys[index]] = result.error or "no answer"
                else:
                    self._store(keys[index], result.choices[0])
        return [self._result(request, errors) for request in requests]

    def _result(self, request: ChatRequest, errors: dict[str, str]) -> ChatResult:
        keys = [self._key(request, index) for index in range(request.params.n)]
        failed = next((errors[key] for key in keys if key in errors), None)
        return ChatResult(tuple(self.known[key] for key in keys if key in self.known), error=failed)

    def _key(self, request: ChatRequest, index: int) -> str:
        return request.key(self.inner.name, self.revision, index)

    def _store(self, key: str, choice: Choice) -> None:
        self._check()
        content: dict[str, Any] = asdict(choice)
        if self.packed:
            data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
            content = {"packed": base64.b64encode(zlib.compress(data)).decode()}
        known = {"key": key, "model": self.inner.name, "revision": self.revision}
        line = json.dumps({**known, **content}, ensure_ascii=False) + "\n"
        # One write of a whole line to a file opened for appending: processes that share it do not mix their lines.
        with self.lock, self.path.open("ab") as file:
            file.write(line.encode("utf-8", "surrogatepass"))
        self.known[key] = choice


class Recorded:
    """Replay stored answers and nothing else: a study without a model.

    Args:
        path: A file that :class:`Cached` wrote.
        name: Of the model that was recorded, since it belongs to the addresses; the one that the file names when not
            given.
        revision: As it was recorded; likewise.

    Raises:
        CheckpointError: The file does not exist.
        RecipeError: It holds answers of several models, or names none.
    """

    def __init__(self, path: str | os.PathLike[str], *, name: str | None = None, revision: str | None = None) -> None:
        if not Path(path).is_file():
            raise CheckpointError(f"There is no recording {path}. Give a file that a run has written.")
        if name is None:
            told = {(line["model"], line.get("revision", "")) for line in read_lines_of(Path(path)) if "model" in line}
            if len(told) != 1:
                raise RecipeError(
                    f"{path} names {len(told)} models, expected one. Give the name that it was recorded under."
                )
            ((name, found),) = told
            revision = found if revision is None else revision
        self.path, self.name, self.revision = Path(path), name, revision or ""
        self.known = read_samples(self.path)
        self.caps: frozenset[str] = frozenset({"n", "seed", "sampling"})

    def generate(self, requests: Sequence[ChatRequest]) -> list[ChatResult]:
        """Answer every request.

        Raises:
            RecipeError: An answer was not recorded.
        """
        results = []
        for request in requests:
            keys = [request.key(self.name, self.revision, index) for index in range(request.params.n)]
            if lost := [index for index, key in enumerate(keys) if key not in self.known]:
                asked = request.tag or f"with the SHA-256 {fingerprint(request.messages[-1]['content'])[:12]}…"
                raise RecipeError(
                    f"{self.path} has no sample {lost[0]} of request {asked}. Record it with the model first."
                )
            results.append(ChatResult(tuple(self.known[key] for key in keys)))
        return results


def read_samples(path: Path) -> dict[str, Choice]:
    """Return the whole lines of a file of samples; the last line may have been cut by a kill.

    Raises:
        CheckpointError: Another line is no sample.
    """
    found: dict[str, Choice] = {}
    for number, entry in enumerate(read_lines_of(path), 1):
        try:
            key = entry.pop("key")
            for told in ("model", "revision"):
                entry.pop(told, None)
            if "packed" in entry:
                inflate = zlib.decompressobj()
                data = inflate.decompress(base64.b64decode(entry["packed"]), LONGEST)
                if not inflate.eof:
                    raise ValueError("it is cut, or longer than any answer")
                entry = loads(data.decode("utf-8", "surrogatepass"))
            found[key] = Choice(**entry)
        except (KeyError, TypeError, ValueError, zlib.error):
            raise CheckpointError(f"{path}, line {number} is no sample. Move the file away.") from None
    return found


def read_lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of JSON of a file that is only appended to, without what a kill has cut.

    A cut line may stand in the middle, where a later start has closed it; it never ends as whole ones do.

    Raises:
        CheckpointError: A line that was not cut is no mapping.
    """
    found: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = loads(line.decode("utf-8", "surrogatepass"))
        except ValueError:
            entry = None
        if isinstance(entry, dict):
            found.append(entry)
        elif line.rstrip().endswith(b"}"):
            raise CheckpointError(f"{path}, line {number} is no mapping. Move the file away.")
    return found
