"""Prompts whose answers a program can check."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from modicum.errors import CheckpointError, RecipeError
from modicum.evaluate.checks import read
from modicum.evaluate.rows import Row, Rows
from modicum.jobs.data.kinds.completion import prompted
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.tokens import text_of
from modicum.registry import row_kind

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


def no_answers(
    rows: Rows, _tokenizer: PreTrainedTokenizerBase, section: DataSection, _note: Callable[[str], None] | None
) -> datasets.Dataset:
    """Refuse to learn from rows that only ask.

    Raises:
        CheckpointError: Always.
    """
    raise CheckpointError(
        f"{section.path} holds {rows.kind} rows, which ask and do not answer: there is nothing to learn. Give prompt "
        "and completion."
    )


@row_kind("instruction", fields=("prompt", "checks"), order=50, tokenize=no_answers)
def instruction(section: DataSection, row: Row, index: int) -> Row:
    """Read a prompt with the checks of its answer; ``section.template`` and ``section.system`` surround the prompt.

    Args:
        section: ``fields``, ``template`` and ``system`` are read.
        row: A row of the source; ``checks`` are those of :func:`modicum.evaluate.checks.kept`.
        index: Its number, for errors.

    Raises:
        RecipeError: There is no check, or one that does not exist.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> checks = [{"kind": "words", "count": 2}]
        >>> instruction(DataSection(path="x"), {"prompt": "Two words.", "checks": checks}, 0)["checks"] == checks
        True
    """
    asked = prompted(section, text_of(section, row, "prompt", index), "")
    del asked["completion"]
    checks = row.get(section.fields.of("checks"))
    if not isinstance(checks, list) or not checks:
        raise RecipeError(f"{section.path}, row {index}: the checks are {checks!r:.60}, expected a list of at least 1.")
    found = []
    for given in checks:
        # Tables fill the keys that other rows have with nothing.
        check = {k: v for k, v in given.items() if v is not None} if isinstance(given, dict) else given
        found.append(check)
        try:
            read(check)
        except RecipeError as error:
            raise RecipeError(f"{section.path}, row {index}: {error}") from None
    return asked | {"checks": found}
