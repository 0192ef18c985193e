"""The files of this machine that stand behind a name of data: all of a folder, and what a loader is told to read."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modicum.borders import expanded
from modicum.content import files_in


def whole(name: str) -> Iterator[str]:
    """Yield a file or folder of data, and what counts as nothing of it where it looks like a model: rows are all."""
    yield name
    path = expanded(name)
    if path.is_dir():
        known = {*files_in(path)}
        yield from (str(file) for file in data_files(path) if file not in known)


def data_files(path: Path) -> list[Path]:
    """Return the files in a folder of data, but for hidden ones."""
    return [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]


def of_loader(arguments: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the arguments of ``datasets.load_dataset`` name of this machine."""
    folder, left = arguments.get("data_dir"), [arguments.get("data_files")]
    base = expanded(folder) if isinstance(folder, str) else Path()
    if left == [None]:
        yield from whole(str(folder)) if isinstance(folder, str) and base.is_dir() else ()
    while left:
        given = left.pop(0)
        if isinstance(given, Mapping):
            left += given.values()
        elif isinstance(given, list | tuple):
            left += given
        elif isinstance(given, str) and "://" not in given:
            found = glob.glob(str(base / expanded(given)), recursive=True)  # noqa: PTH207 - it may be absolute
            yield from sorted(path for path in found if Path(path).is_file())
