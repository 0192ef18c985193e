"""Requests to one server: retried with growing waits, as many at a time as it bears, and no key in any message."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import sha256
from queue import SimpleQueue
from typing import Any, TypeVar
from urllib.parse import urlsplit

from modicum.borders import loads

T = TypeVar("T")
R = TypeVar("R")

LONGEST_WAIT = 30.0  # seconds between two attempts, whatever the server asks for
LARGEST = 1 << 26  # bytes of an answer
QUOTED = 20  # letters in a row that an error shares with its request only if it quotes it


class FailedError(Exception):
    """A request that got no usable answer; the text says why, in a few words."""


class Endpoint:
    """A server's address, with what it has shown to bear.

    Args:
        url: Without a slash at its end.
        key: Sent as a bearer token.
        timeout: Seconds to wait for an answer.
        retries: Attempts after the first one.
    """

    def __init__(self, url: str, *, key: str | None, timeout: float, retries: int) -> None:
        self.parts, self._key, self.timeout, self.retries = urlsplit(url), key, timeout, retries
        self.idle: list[http.client.HTTPConnection] = []  # open connections that nobody uses just now
        self.busy = 0  # answers of "too many requests" so far, which slow the company down

    def __repr__(self) -> str:
        return f"Endpoint({self.parts.netloc})"

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Return the JSON that the server answers.

        Raises:
            FailedError: It refuses, does not answer within the attempts, or answers something that is no JSON.
        """
        said = "no answer"
        for attempt in range(self.retries + 1):
            try:
                status, text, after = self._send(path, body)
            except (OSError, http.client.HTTPException) as error:
                said, wait = f"{type(error).__name__} at {self.parts.netloc}", None
            else:
                if status < 400:
                    try:
                        return loads(text)
                    except ValueError:
                        raise FailedError(f"the answer is no JSON: {_unquoted(text)}") from None
                said = f"status {status}: {self._reason(text, body)}"
                if status not in (408, 409, 429) and status < 500:
                    raise FailedError(said)
                self.busy += status in (429, 503)
                wait = after
            if attempt < self.retries:
                growing = min(LONGEST_WAIT, 0.5 * 2**attempt)
                # Waits differ at random, so that requests which failed together do not come back together.
                time.sleep(min(LONGEST_WAIT, wait) if wait is not None else growing * random.uniform(0.5, 1.0))  # noqa: S311
        raise FailedError(f"{said}, after {self.retries + 1} attempts")

    def _send(self, path: str, body: Mapping[str, Any]) -> tuple[int, bytes, float | None]:
        data = json.dumps(body, ensure_ascii=True).encode()
        try:
            connection = self.idle.pop()
        except IndexError:
            return self._exchange(self._connect(), path, data)
        try:
            return self._exchange(connection, path, data)
        except ConnectionError:
            # A connection that the server has closed while it was idle says nothing about the server: this was no
            # attempt. The others have been idle for longer.
            self.close()
            return self._exchange(self._connect(), path, data)

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self.parts.scheme == "https" else http.client.HTTPConnection
        return kind(self.parts.hostname or "", self.parts.port, timeout=self.timeout)

    def _exchange(
        self, connection: http.client.HTTPConnection, path: str, data: bytes
    ) -> tuple[int, bytes, float | None]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection.request("POST", f"{self.parts.path}{path}", data, headers)
            response = connection.getresponse()
            text = response.read(LARGEST + 1)
            if len(text) > LARGEST:
                raise FailedError(f"the answer is longer than {LARGEST >> 20} MiB")
        except BaseException:
            connection.close()
            raise
        if response.will_close:
            connection.close()
        else:
            self.idle.append(connection)
        after = response.getheader("Retry-After")
        return response.status, text, float(after) if after and after.isdigit() else None

    def close(self) -> None:
        """Close the connections that nobody uses."""
        with suppress(IndexError):  # another thread may have taken the last one
            while True:
                self.idle.pop().close()

    def _reason(self, text: bytes, body: Mapping[str, Any]) -> str:
        """Return what the server says of the error, in one line and without the key, which some servers repeat.

        A request, or an answer that a server's filter took back, must not get into records by way of an error: what is
        no error of the protocol, or holds words of the request, is told by its length and hash.
        """
        try:
            found = loads(text)
            error = found.get("error", found) if isinstance(found, dict) else found
            said = error.get("message") or error.get("detail") if isinstance(error, dict) else error
        except ValueError:
            said = None
        if not isinstance(said, str) or not said.strip():
            return _unquoted(text)
        line = " ".join(said.split())
        asked = " ".join(" ".join(_texts([body.get("messages"), body.get("state")])).split())
        if any(line[i : i + QUOTED] in asked for i in range(len(line) - QUOTED + 1)):
            return _unquoted(text)
        return (line.replace(self._key, "***") if self._key else line)[:200]


def _unquoted(text: bytes) -> str:
    """Return what stands for a server's words in an error."""
    return f"{len(text)} bytes with the SHA-256 {sha256(text).hexdigest()[:12]}…"


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(inner)


def together(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    most: int,
    endpoint: Endpoint,
    progress: Callable[[int], None] = lambda _: None,
) -> list[R]:
    """Return ``function`` of every item, in order, with as many at a time as the server bears.

    The number doubles with every round of answers as long as not fewer of them come in a second, else it goes back to
    the one that brought most and stays there for some rounds. It halves when the server says that there are too many.
    """
    parts = coming(function, items, most=most, endpoint=endpoint, progress=progress)
    found = dict(pair for part in parts for pair in part)
    return [found[index] for index in range(len(items))]


def coming(
    function: Callable[[T], R],
    items: Sequence[T],
    *,
    most: int,
    endpoint: Endpoint,
    progress: Callable[[int], None] = lambda _: None,
) -> Iterator[list[tuple[int, R]]]:
    """Yield numbers and results as :func:`together`, all that have come since the last ones were taken."""
    gate = _Gate(min(4, most), most, endpoint)
    stopped = threading.Event()
    come: SimpleQueue[Future[tuple[int, R]]] = SimpleQueue()

    def run(index: int, item: T) -> tuple[int, R]:
        with gate:
            if stopped.is_set():
                raise CancelledError
            return index, function(item)

    pool = ThreadPoolExecutor(max_workers=max(1, min(most, len(items))))
    try:
        for index, item in enumerate(items):
            pool.submit(run, index, item).add_done_callback(come.put)
        left = len(items)
        while left:
            part = [come.get().result()]
            part += [come.get().result() for _ in range(come.qsize())]
            left -= len(part)
            progress(len(part))
            yield part
    finally:
        stopped.set()  # whoever stops listening, or is interrupted, sends no further requests
        pool.shutdown(cancel_futures=True)
        endpoint.close()


class _Gate:
    """Lets a changing number of threads through."""

    def __init__(self, start: int, most: int, endpoint: Endpoint) -> None:
        self.limit, self.most, self.endpoint = start, most, endpoint
        self.condition = threading.Condition()
        self.inside = self.done = 0
        self.busy, self.since = endpoint.busy, time.monotonic()
        self.best = (0.0, start)  # most answers a second so far, and the number that brought them
        self.hold, self.patience = 0, 4  # rounds to stay as it is, now and after the next retreat

    def __enter__(self) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.inside < self.limit)
            self.inside += 1

    def __exit__(self, *_: object) -> None:
        with self.condition:
            self.inside -= 1
            self.done += 1
            if self.endpoint.busy > self.busy:
                self.limit, self.busy = max(1, self.limit // 2), self.endpoint.busy
                self._restart()
            elif self.done >= 2 * self.limit:
                rate = self.done / max(1e-6, time.monotonic() - self.since)
                self.best = max(self.best, (rate, self.limit))
                # A server of one core answers no faster for being asked by more; one that batches does.
                if self.hold:
                    self.hold -= 1
                elif rate >= 0.95 * self.best[0]:
                    self.limit = min(self.most, 2 * self.limit)
                else:
                    self.limit, self.hold, self.patience = self.best[1], self.patience, 2 * self.patience
                self._restart()
            self.condition.notify_all()

    def _restart(self) -> None:
        self.done, self.since = 0, time.monotonic()
