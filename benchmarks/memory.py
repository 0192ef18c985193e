"""Memory of this process as the kernel counts it. Linux only."""

from __future__ import annotations

import threading
from pathlib import Path


def status(field: str) -> int:
    """Return a line of ``/proc/self/status``, for example ``RssAnon``, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return 1024 * int(line.split()[1])


class Peak:
    """The largest anonymous resident set while the block ran, in ``bytes``; exact, where polling misses short peaks."""

    def __enter__(self) -> Peak:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        return self

    def __exit__(self, *_: object) -> None:
        # Pages of mapped files are read-only inputs and libraries: they stay as they are while the block runs.
        self.bytes = status("VmHWM") - status("RssFile")


class Polled:
    """The same where the block maps files and lets go of them, which would count as its own: asked every 2 ms."""

    def __enter__(self) -> Polled:
        self.bytes, self._end = status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()
        return self

    def _poll(self) -> None:
        while not self._end.wait(0.002):
            self.bytes = max(self.bytes, status("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
