"""Rows that are made from a seed, one file for each set: pairs of answers, and what evaluations ask of an answer.

The chosen and the rejected answer differ in the one thing that is asked for, so a pair teaches that thing alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from modicum.evaluate.rows import Row
from modicum.jobs.data.made.instructions import instructions
from modicum.jobs.data.made.unanswerable import unanswerable

MADE_SIZE = 500  # rows when the recipe does not say
MADE: Mapping[str, Callable[[str, int, int], list[Row]]] = {
    "instructions": instructions,
    "unanswerable": unanswerable,
}
