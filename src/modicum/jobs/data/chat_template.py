"""Chat templates are programs that come with a model: they run in transformers' sandbox, in a process of limited means.

The sandbox keeps a template from files and from Python's inside; it does not keep it from looping for years, or from
asking for all memory. So a forked process writes the conversations, and is ended when one takes too long.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
import weakref
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

from modicum.errors import CheckpointError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECONDS = 2.0  # of the processor, for one conversation: a machine that is busy makes no template slow
PATIENCE = 60.0  # seconds by the clock, for a process that gets no processor at all
MEMORY = 1 << 30  # bytes that the process may take beyond what it began with
ADDED, TIMES = 1 << 20, 8  # bytes that a template may add to a conversation, and how often it may write it
_writers: weakref.WeakKeyDictionary[Any, _Writer] = weakref.WeakKeyDictionary()


def apply(tokenizer: PreTrainedTokenizerBase, messages: Iterable[Mapping[str, Any]], *, prompt: bool = False) -> str:
    """Return a conversation as the tokenizer's chat template writes it.

    Args:
        tokenizer: With a template.
        messages: With ``role`` and ``content``.
        prompt: End where the assistant begins to answer.

    Raises:
        CheckpointError: The template refuses the conversation, fails, or takes more time or memory than any honest one.
    """
    asked = [dict(message) for message in messages]
    if not hasattr(os, "fork"):
        return _take(asked, _write(tokenizer, asked, prompt))
    state = (os.getpid(), json.dumps([tokenizer.chat_template, tokenizer.special_tokens_map], default=str))
    writer = _writers.get(tokenizer)
    if writer is None or writer.state != state:
        writer = _writers[tokenizer] = _Writer(tokenizer, state)
    return _take(asked, writer.ask(asked, prompt))


def _take(messages: list[dict[str, Any]], answer: Mapping[str, str]) -> str:
    if "text" in answer:
        return answer["text"]
    roles = ", ".join(str(message.get("role")) for message in messages[:5]) + (", …" if len(messages) > 5 else "")
    said = f"The chat template {answer['verb']} a conversation of {roles}: {answer['why']}"
    raise CheckpointError(f"{said} Correct the template, or the rows.")


def _write(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], prompt: bool) -> dict[str, str]:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        return {"text": str(text)}
    except TemplateError as error:
        return {"verb": "refuses", "why": first_line(error)}
    except MemoryError:
        return {"verb": "takes more than 1 GiB for", "why": "it is no template."}
    except Exception as error:  # whatever a program can raise
        return {"verb": "fails on", "why": f"{type(error).__name__}: {first_line(error)}"}


class _Writer:
    """The process that writes the conversations of one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, state: tuple[int, str]) -> None:
        self.state = state
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(tokenizer, asked, answered)
        os.close(asked)
        os.close(answered)
        self._end = weakref.finalize(self, _finish, self._pid, self._ask, self._answers, os.getpid())

    def ask(self, messages: list[dict[str, Any]], prompt: bool) -> dict[str, str]:
        line = json.dumps([messages, prompt]).encode() + b"\n"
        deadline, answer = time.monotonic() + PATIENCE, bytearray()
        with suppress(BrokenPipeError):
            _send(self._ask, line)
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                self._stop()
                return {"verb": f"takes more than {PATIENCE:g} s for", "why": "it is no template."}
            piece = os.read(self._answers, 1 << 20)
            if not piece:
                means = f"than {SECONDS:g} s" if self._was_slow() else "memory than there is"
                self._stop()
                return {"verb": f"takes more {means} for", "why": "it is no template."}
            answer += piece
            if len(answer) > ADDED + TIMES * len(line):  # each row would be read as so many tokens
                self._stop()
                return {"verb": f"adds more than {ADDED >> 20} MiB to", "why": "it is no template."}
        found: dict[str, str] = json.loads(answer)
        return found

    def _was_slow(self) -> bool:
        """Whether the process was ended by its timer; who waits for it later still can."""
        if not hasattr(os, "waitid"):
            return False
        end = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        return end is not None and end.si_code == os.CLD_KILLED and end.si_status == signal.SIGPROF

    def _stop(self) -> None:
        self._end()
        self.state = (0, "")  # the next conversation gets a new process


def _send(descriptor: int, line: bytes) -> None:
    view = memoryview(line)
    while view:
        view = view[os.write(descriptor, view) :]


def _finish(pid: int, *rest: int) -> None:
    *descriptors, parent = rest
    if os.getpid() != parent:
        return  # a fork of ours has the same objects, but neither the process nor a need to end it
    for descriptor in descriptors:
        with suppress(OSError):
            os.close(descriptor)
    with suppress(OSError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _serve(tokenizer: PreTrainedTokenizerBase, asked: int, answered: int) -> NoReturn:
    """Write conversations until nobody asks any more."""
    try:
        import resource

        parent = os.getppid()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPROF):
            signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
        with suppress(OSError, ValueError):  # where the system cannot say
            with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no object more than needed
                taken = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
        waiting = bytearray()
        while True:
            # Forks of the parent hold its end of the pipe open: whether it lives is seen from its number.
            if not select.select([asked], [], [], 1.0)[0]:
                if os.getppid() != parent:
                    break
                continue
            piece = os.read(asked, 1 << 20)
            if not piece:
                break
            waiting += piece
            while b"\n" in waiting:
                line, _, waiting = waiting.partition(b"\n")
                messages, prompt = json.loads(line)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)  # ends the process, whatever it does
                answer = _write(tokenizer, messages, prompt)
                signal.setitimer(signal.ITIMER_PROF, 0)
                try:
                    told = json.dumps(answer).encode() + b"\n"
                except MemoryError:
                    told = b'{"verb": "takes more than 1 GiB for", "why": "it is no template."}\n'
                _send(answered, told)
    finally:
        os._exit(0)
