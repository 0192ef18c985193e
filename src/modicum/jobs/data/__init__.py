"""Data: sections of recipes, sources, rows, tokens."""

from typing import TYPE_CHECKING

from modicum.lazy import face

if TYPE_CHECKING:
    from modicum.evaluate.rows import Rows
    from modicum.jobs.data.collators import LabelledLogits, PaddingCollator, collate
    from modicum.jobs.data.rows import load_rows
    from modicum.jobs.data.section import DataSection, Fields
    from modicum.jobs.data.tokens import tokenize

__all__ = ["DataSection", "Fields", "LabelledLogits", "PaddingCollator", "Rows", "collate", "load_rows", "tokenize"]

face(__name__)
