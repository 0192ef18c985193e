"""Cells of a grid: each is measured once, by one process, and stored whole.

A cell is a mapping that JSON can hold, under a key. Measuring stops and goes on at any cell: a stored cell is not
measured again, and nothing of an interrupted cell remains. Where several processes or machines share a folder, each
claims a cell before it measures it, and passes over cells that others have claimed::

    store = Folder(Path("grid"))
    left = fill(store, {"ties|0.2": measure, …}, claims=Path("grid"))
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeAlias
from urllib.parse import quote

from modicum.borders import border, check_plain, loads
from modicum.durable import write_atomic
from modicum.environment import environment
from modicum.errors import CheckpointError
from modicum.lock import CLAIM, HeldError, hold

LONGEST = 200  # letters of a file's name that a key gives, of 255 that there may be
REMEDY = "Delete it and run again: what it held is measured anew."
Cell: TypeAlias = dict[str, Any]
Measure: TypeAlias = Callable[[], Cell]


class Store(Protocol):
    """Where finished cells are. Setting one stores it whole or not at all; a plain dictionary is a store too."""

    def __contains__(self, key: object, /) -> bool: ...
    def __getitem__(self, key: str, /) -> Cell: ...
    def __setitem__(self, key: str, cell: Cell, /) -> None: ...


def once(
    store: Store, key: str, measure: Measure, *, claims: Path | None = None, check: Callable[[], None] = lambda: None
) -> Cell | None:
    """Return the stored cell of ``key``, or measure and store it now.

    Args:
        store: Finished cells.
        key: Which cell.
        measure: Gives the cell; the seconds that it takes are added as ``seconds``, unless the cell has its own.
        claims: Folder of the claims, which all processes that fill the store share; ``None`` where one works alone.
        check: Called before a cell is stored; what it raises, as of an input that changed, keeps the cell out.

    Returns:
        The cell, or ``None`` while another process measures it.

    Example:
        >>> cells = {}
        >>> once(cells, "a", lambda: {"value": 1, "seconds": 0.0}), once(cells, "a", lambda: {"value": 2})
        ({'value': 1, 'seconds': 0.0}, {'value': 1, 'seconds': 0.0})
    """
    if key in store:
        return store[key]
    with claim(claims, key) as mine:
        if not mine:
            return None
        if key not in store:  # another process may have finished it while this one asked for the claim
            began = time.monotonic()
            found = measure()
            check()
            store[key] = found if "seconds" in found else {"seconds": round(time.monotonic() - began, 3), **found}
        return store[key]


def fill(
    store: Store,
    wanted: Mapping[str, Measure],
    *,
    minutes: float = math.inf,
    claims: Path | None = None,
    tell: Callable[[str, Cell], None] = lambda *_: None,
    check: Callable[[], None] = lambda: None,
) -> list[str]:
    """Measure the cells that are not stored yet, in their order.

    Args:
        store: Finished cells.
        wanted: A function that measures the cell, for each key.
        minutes: No cell is begun after so many.
        claims: See :func:`once`.
        tell: Called with the key and cell that was just stored.
        check: See :func:`once`.

    Returns:
        Keys of the cells that are still left: too late, or measured by others at this moment.

    Example:
        >>> cells = {"a": {"value": 1}}
        >>> fill(cells, {"a": dict, "b": lambda: {"value": 2}}), cells["b"]["value"]
        ([], 2)
    """
    until = time.monotonic() + 60 * minutes
    left = []
    for key, measure in wanted.items():
        if key in store:
            continue
        cell = None if time.monotonic() > until else once(store, key, measure, claims=claims, check=check)
        if cell is None:
            left.append(key)
        else:
            tell(key, cell)
    return left


@contextmanager
def claim(claims: Path | None, key: str) -> Iterator[bool]:
    """Claim a cell while the block runs, and tell whether it is ours. A dead process's claim is taken over."""
    with ExitStack() as stack:
        if claims is not None:
            claims.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(hold(claims / f".{_file_name(key)}{CLAIM}", f"cell {key!r}"))
            except HeldError:
                yield False
                return
        yield True


@dataclass(frozen=True)
class Folder:
    """A store of one file for each cell, which several machines may fill together.

    Args:
        path: The folder; made when the first cell is stored.
    """

    path: Path

    def __contains__(self, key: object) -> bool:
        return self._file(str(key)).is_file()

    def __getitem__(self, key: str) -> Cell:
        file = self._file(key)
        check_plain(file, REMEDY)
        with border(file, REMEDY):
            cell = _mapping(loads(file.read_bytes()))
        return cell

    def __setitem__(self, key: str, cell: Cell) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self._file(key), json.dumps(cell, indent=1, ensure_ascii=False) + "\n")

    def _file(self, key: str) -> Path:
        return self.path / f"{_file_name(key)}.json"


@dataclass
class Document:
    """A store of one JSON document, which one process fills: the results of a study, to be committed.

    Args:
        path: The file; made when the first cell is stored.
        about: Sizes and settings of all cells. Cells of other sizes are another study: they are not mixed in.

    Raises:
        CheckpointError: The file holds cells that were measured with something else.
    """

    path: Path
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        about = json.loads(json.dumps(dict(self.about)))  # as the file will have it: tuples become lists
        self._content: dict[str, Any] = {"study": self.path.stem, "about": about, "cells": {}}
        if self.path.exists():
            check_plain(self.path, REMEDY)
            with border(self.path, REMEDY):
                found = _mapping(loads(self.path.read_bytes()))
                cells = {key: _mapping(cell) for key, cell in _mapping(found["cells"]).items()}
                self._content = {**found, "about": _mapping(found.get("about", {})), "cells": cells}
        before = self._content["about"]
        if before != about:
            changed = sorted(key for key in {*before, *about} if before.get(key) != about.get(key))
            raise CheckpointError(f"{self.path} was measured with other {', '.join(changed)}. Move it away first.")

    def __contains__(self, key: object) -> bool:
        return key in self._content["cells"]

    def __getitem__(self, key: str) -> Cell:
        cell: Cell = self._content["cells"][key]
        return cell

    def __setitem__(self, key: str, cell: Cell) -> None:
        self._content["cells"][key] = cell
        self._content["environment"] = environment()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path, json.dumps(self._content, indent=1) + "\n")


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{type(value).__name__} in the place of a mapping")
    return value


def _file_name(key: str) -> str:
    # Keys hold model names and numbers; a slash or a leading dot would make another path of them.
    name = quote(key, safe=" =,+|()")
    if len(name) > LONGEST:
        name = f"{name[:LONGEST]}+{sha256(key.encode()).hexdigest()[:16]}"
    return f"%2E{name[1:]}" if name.startswith(".") else name
