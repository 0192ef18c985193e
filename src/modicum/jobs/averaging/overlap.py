"""Whether rows that judge a search were searched themselves."""

from __future__ import annotations

from modicum.errors import RecipeError
from modicum.evaluate.rows import Rows
from modicum.record import digest


def note_on_overlap(searched: Rows, held_out: Rows) -> list[str]:
    """Say how many of the held-out rows are among the searched ones, where some are.

    Raises:
        RecipeError: All are.
    """
    known = {digest(row) for row in searched.rows}
    shared = sum(digest(row) in known for row in held_out.rows)
    if shared == len(held_out):
        raise RecipeError(
            f"All {shared} rows of held_out are among those of data, so nothing is held out. Give other rows, or "
            "remove held_out."
        )
    told = f"{shared} of {len(held_out)} rows of held_out are among those of data: the choice is judged on them too"
    return [told] if shared else []
