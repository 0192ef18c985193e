"""A process of the executor ``local``: reads a task in each line of its input, and answers each with a line.

It ends with the process that started it, in the middle of a task too: what is finished of the stage is kept, and the
stage goes on when it is run again.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading

from modicum import shortened
from modicum.jobs.executors import answer
from modicum.processes import hush_libraries


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one decides
    shortened.install()
    hush_libraries()
    tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(tasks,), daemon=True).start()
    while True:
        answers.write(answer(tasks.get()) + "\n")
        answers.flush()


def _read(tasks: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        tasks.put(line)
    os._exit(0)


if __name__ == "__main__":
    main()
