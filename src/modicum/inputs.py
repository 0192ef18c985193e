"""What a run reads, by content: files and folders by the hash of all their bytes, what lies elsewhere by its revision.

An adapter brings the model that it was trained on along, and a model its tokenizer, which lies in its folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from modicum.borders import check_plain, expanded, loads
from modicum.content import WEIGHTS, Stamp, changed, check_in_place, combine, files_in, hash_file, hash_files
from modicum.errors import CheckpointError
from modicum.layout import ADAPTER_CONFIG
from modicum.references import beside, pinned, revision_of


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run as they were when it began.

    Attributes:
        hashes: What each reference stood for.
        files: Every file of this machine among them, its hash, and how it looked.
    """

    hashes: Mapping[str, str]
    files: Mapping[Path, tuple[Stamp, str]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise unless the files still hold what they held; one that was merely touched or copied does.

        Raises:
            CheckpointError: One was changed or removed since.
        """
        for path, (stamp, known) in self.files.items():
            try:
                same = Stamp.of(path) == stamp or hash_file(path) == known
            except CheckpointError:
                same = False
            if not same:
                raise changed(path)

    def check_mapped(self) -> None:
        """Raise where weights that were loaded, and may lie in memory as a map of their file, were written over.

        A file that was removed or replaced by another is kept by the system for whoever maps it.

        Raises:
            CheckpointError: One was changed in place.
        """
        for path, (stamp, known) in self.files.items():
            if path.suffix in WEIGHTS:
                check_in_place(path, stamp, known)


def look(references: Iterable[str]) -> Inputs:
    """Hash what each reference stands for now, and what it needs besides.

    Args:
        references: Paths, Hub ids, builtin models; anything else stands for itself.

    Raises:
        CheckpointError: A file cannot be read, or changes meanwhile.
    """
    local: dict[str, list[Path]] = {}
    hashes: dict[str, str] = {}
    waiting = list(references)
    while waiting:
        name = waiting.pop(0)
        if name in hashes:
            continue
        path = expanded(name)
        hashes[name] = name
        if _exists(path):
            local[name] = files_in(path)
            known = {expanded(other).resolve() for other in local}
            waiting += [base for base in _base_of(path) if expanded(base).resolve() not in known]
        else:
            hashes[name] = revision_of(name)
    stamps = {path: Stamp.of(path) for paths in local.values() for path in paths}
    found = hash_files(list(stamps))
    for name, paths in local.items():
        hashes[name] = combine(expanded(name), {path: found[path] for path in paths})
    return Inputs(hashes, {path: (stamp, found[path]) for path, stamp in stamps.items()})


def check_readable(references: Iterable[str]) -> None:
    """Raise where :func:`look` would, without reading the files.

    Raises:
        CheckpointError: A file cannot be read.
    """
    for name in dict.fromkeys(references):
        path = expanded(name)
        for file in files_in(path) if _exists(path) else ():
            Stamp.of(file)
            if not os.access(file, os.R_OK):
                raise CheckpointError(f"Cannot read {file}: permission denied. Change its mode, or name another file.")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _base_of(folder: Path) -> Iterator[str]:
    """Yield the reference of the model beneath an adapter."""
    check_plain(folder / ADAPTER_CONFIG)
    try:
        config = loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base, revision = config.get("base_model_name_or_path"), config.get("revision")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # no adapter, or one that whoever opens it will refuse
    if isinstance(base, str) and base:
        yield pinned(beside(folder, base), revision if isinstance(revision, str) else None)
