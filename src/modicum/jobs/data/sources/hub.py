"""Data sets of the Hub, and whatever else ``datasets.load_dataset`` takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from modicum.data_files import of_loader
from modicum.errors import CheckpointError, ModicumError, first_line
from modicum.evaluate.rows import Row
from modicum.jobs.data.section import DataSection
from modicum.jobs.data.sources.local import SUFFIXES, rows_of
from modicum.registry import source


def _revision(section: DataSection, name: str) -> Iterator[str]:
    """Yield the id with its revision, whose commit identifies what is read, and files that a loader is given."""
    revision = section.config.get("revision")
    yield f"dataset:{name}@{revision}" if isinstance(revision, str) else f"dataset:{name}"
    if "/" not in name:
        yield from of_loader(section.config)


@source("hub", open_config=True, inputs=_revision)
def hub(section: DataSection, name: str) -> list[Row]:
    """Read a data set of the Hub through ``datasets``. ``config`` holds further arguments of ``load_dataset``.

    Args:
        section: ``split``, ``size`` and ``config`` are read.
        name: Id of the data set.

    Raises:
        CheckpointError: There is no such data set, or it lacks the split.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> rows = hub(DataSection(path="me/data", split="test"), "me/data")  # doctest: +SKIP

    Cost:
        A download, kept in the cache of ``datasets``; files of this machine are read anew.
    """
    if name.startswith((".", "/", "~")) or Path(name).suffix in SUFFIXES:
        raise CheckpointError(f"There is no data file or folder {name}. Check the path.")
    import datasets

    try:
        if "/" not in name and not {"cache_dir", "streaming"} & section.config.keys():
            # A loader of local files would take rows from its cache that were made of other bytes of the same time.
            with tempfile.TemporaryDirectory(prefix="modicum-") as cache:
                own = {"cache_dir": cache, "keep_in_memory": True}
                return rows_of(datasets.load_dataset(name, split=section.split, **section.config | own), section)
        data = datasets.load_dataset(name, split=section.split, **section.config)
    except ModicumError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"There is no file {name}, and the Hub gave no such data: {first_line(error)} "
            "Check the path, or the Hub's name, the split and the network."
        ) from None
    return rows_of(data, section)
