"""What every campaign does alike: options, a folder to work in, cases until the time is over, and an exit status.

A campaign is a function of a :class:`Campaign` under :func:`main`. It takes its cases from :meth:`Campaign.cases` or
:meth:`Campaign.numbers`, which leave out those that were counted before, and tells of each with :meth:`Campaign.tell`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from campaigns.tally import Tally

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


@dataclass
class Campaign:
    """A campaign at work.

    Attributes:
        chosen: Its options.
        work: A folder of its own.
        result: The file of its counts.
        every: After how many cases these are written.
        key: Of its counts; the seed, unless it is set before the first case.
    """

    chosen: argparse.Namespace
    work: Path
    result: Path
    every: int
    key: int | str

    @cached_property
    def count(self) -> Tally:
        """The counts; of a trial, or of chosen cases alone, they are not kept."""
        kept = not (self.chosen.trial or self.chosen.only)
        return Tally(self.result, self.key, resume=kept, every=self.every)

    def numbers(self) -> Iterator[int]:
        """Yield numbers from the first that was not tried, until the time is over."""
        deadline, number = time.monotonic() + self.chosen.seconds, max(self.count.done, self.chosen.start)
        while time.monotonic() < deadline:
            yield number
            number += 1

    def cases(self, every: Iterable[T], title: Callable[[T], str]) -> Iterator[tuple[int, T]]:
        """Yield the cases that were not tried, of those asked for, with their numbers, until the time is over."""
        deadline, first = time.monotonic() + self.chosen.seconds, max(self.count.done, self.chosen.start)
        for number, case in enumerate(every):
            if time.monotonic() > deadline:
                return
            if number >= first and self.chosen.only in title(case):
                yield number, case

    def rng(self, number: int) -> random.Random:
        """Return the chance of one case."""
        return random.Random(self.chosen.seed * 1_000_003 + number)

    def tell(
        self, number: int, title: str, how: str, wrong: str | None, *, said: str = "", seconds: float = 0.0
    ) -> None:
        """Count a case: how it ended, and what was wrong with it; what it said is shown, not counted."""
        self.count.add(how, seconds, number, wrong and f"{title}: {wrong}")
        if wrong or self.chosen.show:
            print(number, title, "->", wrong or f"{how} {said[:300]}", flush=True)


def main(
    doc: str | None, result: Path, body: Callable[[Campaign], None], *, every: int = 50, **more: tuple[object, str]
) -> int:
    """Run a campaign; returns 1 if anything was wrong.

    Args:
        doc: What it is, for ``--help``.
        result: The file of its counts.
        body: Builds its world, and tries cases.
        every: After how many cases the counts are written.
        more: Options of its own, by name: the default, and what it is.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="for cases; what they work on is made before")
    parser.add_argument("--seed", type=int, default=0, help="names the order; another one adds to the counts")
    parser.add_argument("--only", default="", help="cases whose title holds this; they are not counted")
    parser.add_argument("--trial", action="store_true", help="count nothing")
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--show", action="store_true", help="print every case")
    parser.add_argument("--work", type=Path, help="a folder for what it works on, which is kept for the next time")
    for name, (default, told) in more.items():
        how = {"action": "store_true"} if default is False else {"type": type(default), "default": default}
        if isinstance(default, tuple):
            how = {"nargs": "+", "default": list(default)}
        parser.add_argument(f"--{name}", help=told, **how)  # type: ignore[arg-type]
    chosen = parser.parse_args()
    work = (chosen.work or Path(tempfile.mkdtemp(prefix=f"{result.stem}-"))).resolve()
    os.environ["MODICUM_CACHE"] = str(work / "cache")
    campaign = Campaign(chosen, work, result, every, chosen.seed)
    try:
        body(campaign)
        campaign.count.write()
    finally:
        os.chdir(ROOT)
        if chosen.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print(campaign.count.told())
    return 1 if campaign.count.wrong else 0
