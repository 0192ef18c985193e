"""How many positions a model has a table of: beyond it there is nothing to look up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from modicum.jobs.data.section import DataSection

COMPUTED = ("rope", "rotary", "alibi")  # what the fields of configurations are called whose positions are computed


def table_of(config: Mapping[str, Any]) -> int | None:
    """Return how many positions a configuration has a table of; nothing where positions are computed.

    Where they are computed, as with rotary embeddings, a model reads as far as it is told.

    Example:
        >>> table_of({"n_positions": 1024}), table_of({"max_position_embeddings": 4096, "rope_theta": 1e4})
        (1024, None)
    """
    if any(word in key for key, value in config.items() if value for word in COMPUTED):
        return None
    found = next((config[key] for key in ("max_position_embeddings", "n_positions") if key in config), None)
    return found if isinstance(found, int) and found > 0 else None


def within_table(section: DataSection, config: Mapping[str, Any], note: Callable[[str], object]) -> DataSection:
    """Return a section whose ``max_length`` is no more than a model's table of positions, if it has one.

    Rows are then cut or left out, and counted, as they are at any other limit.

    Args:
        section: Of rows that the model reads.
        config: The model's.
        note: Told where the limit was lowered.
    """
    most = table_of(config)
    if most is None or section.max_length <= most:
        return section
    note(f"{section.path}: the model has a table of {most} positions: max_length is {most}.")
    return section.model_copy(update={"max_length": most})
