"""Where bytes of others become data of ours: whatever is wrong with them is one line, and never a traceback.

:func:`border` surrounds a parser, ours or a library's: what it raises for malformed content becomes a
:class:`~modicum.errors.CheckpointError` that names the file. :func:`parse_json` and :func:`read_json` are such parsers.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from modicum.errors import CheckpointError, ModicumError, first_line, is_text
from modicum.layout import INDEX, SINGLE

MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NameError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
LARGEST = 256 << 20  # bytes of a text that is read whole, tokenizers being the largest
OURS = "Delete it and run again."  # what to do about a file of a run's own that is none
LONGEST, DEEPEST = 4096, 200  # bytes of a path, and its folders
KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


@contextmanager
def border(what: str | Path, remedy: str = "Download it again.") -> Iterator[None]:
    """Turn whatever malformed content makes a parser raise into one line.

    Args:
        what: Whose content it is.
        remedy: What to do about it.

    Raises:
        CheckpointError: The content is malformed, or the file cannot be read.

    Example:
        >>> with border("mine.json"):
        ...     {"a": 1}["b"]
        Traceback (most recent call last):
            ...
        modicum.errors.CheckpointError: mine.json is malformed (KeyError: 'b'). Download it again.
    """
    try:
        yield
    except ModicumError:
        raise
    except OSError as error:
        raise CheckpointError(f"Cannot read {what}: {error.strerror or error}. Check the path.") from None
    except MALFORMED as error:
        told = first_line(error).rstrip(".")
        kind = type(error).__name__
        said = kind if told == kind else f"{kind}: {told}"
        raise CheckpointError(f"{what} is malformed ({said[:200]}). {remedy}") from None


def check_plain(path: Path, remedy: str = "Give the file itself.") -> None:
    """Refuse what is there but is no plain file or folder, whose reading would never end, and texts beyond all measure.

    Args:
        path: What is going to be opened.
        remedy: What to do about it; of what a run keeps for itself, :data:`OURS`.

    Raises:
        CheckpointError: It is a pipe, a socket or a device.
    """
    try:
        found = path.stat()
    except (OSError, ValueError):
        return  # whoever opens it says why it cannot
    if (kind := KINDS.get(stat.S_IFMT(found.st_mode))) is not None:
        raise CheckpointError(f"{path} is {kind}, expected a file. {remedy}")


def expanded(name: str | os.PathLike[str]) -> Path:
    """Return a path with ``~`` written out; ``~name`` of a user that does not exist stands for itself, as in shells.

    Example:
        >>> expanded("~nobody-of-this-name/model").parts
        ('~nobody-of-this-name', 'model')
    """
    return Path(os.path.expanduser(name))  # noqa: PTH111 - pathlib raises for a user that does not exist


def is_file(name: str | Path) -> bool:
    """Whether there is a file of this name, which may be any text."""
    try:
        return expanded(name).is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def check_name(path: str | Path) -> None:
    """Refuse the name of a place to write to that no file system has, or that libraries cannot write to.

    Raises:
        CheckpointError: It is empty, too long, holds a NUL, or is no text in UTF-8.
    """
    name = str(path)
    if not is_text(name):
        raise CheckpointError(f"{name!r:.80} is no text in UTF-8: no tokenizer can be written there. Choose another.")
    if not name or "\0" in name or len(os.fsencode(name)) >= LONGEST or len(Path(name).parts) > DEEPEST:
        told = name if len(name) < 80 else f"{name[:77]}..."
        raise CheckpointError(f"{told!r} is no name that a file or folder can have. Choose another.")


def check_plain_folder(folder: Path) -> None:
    """Refuse a folder that holds a pipe, a socket or a device in the place of a file; see :func:`check_plain`."""
    try:
        found = list(folder.iterdir())
    except OSError:
        return
    for path in found:
        check_plain(path)


def check_plain_tree(folder: Path) -> None:
    """Refuse a run that holds a pipe, a socket or a device in the place of a file, however deep.

    Whoever reads a run opens many of its files, each at another place of the program.
    """
    for place, _, files in os.walk(folder):
        for name in files:
            check_plain(Path(place, name), OURS)


def loads(text: str | bytes) -> Any:
    """Return what JSON says, as :func:`json.loads` does, with one kind of error for whatever is malformed.

    Raises:
        ValueError: It is no JSON, or nested beyond all measure.
    """
    try:
        return json.loads(text)
    except (RecursionError, MemoryError):
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, owner: str, remedy: str = "Download it again.") -> dict[str, Any]:
    """Return the mapping in a JSON file.

    Args:
        path: The file.
        owner: What it belongs to, for the error.
        remedy: What to do when it is malformed.

    Raises:
        CheckpointError: It cannot be read, is no JSON, or holds something else than a mapping.
    """
    check_plain(path, remedy)
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise CheckpointError(f"{owner}: {path.name} has {size / 1e6:.0f} MB, which is no text to read. {remedy}")
        value = loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{owner}: cannot read {path}: {error.strerror}. Check the folder.") from None
    except ValueError as error:
        if isinstance(error, ModicumError):
            raise
        raise CheckpointError(f"{owner}: {path.name} is not valid JSON. {remedy}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{owner}: {path.name} is not a mapping. {remedy}")
    return value


def read_index(folder: Path, owner: str) -> dict[str, str]:
    """Return the file of each tensor, by its name, from the index of a model's weights.

    Raises:
        CheckpointError: It cannot be read, names no files, or files outside the folder.
    """
    listed = read_json(folder / INDEX, owner).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{owner}: {INDEX} has no weight_map. Download it again.")
    for name, file in listed.items():
        if not isinstance(file, str):
            raise CheckpointError(
                f"{owner}: {INDEX} gives {file!r:.60} as the file of {name!r:.60}. Download it again."
            )
        # Only the written name counts: a cache may well keep the file itself elsewhere, behind a link.
        if Path(file).name != file or file in ("", ".", ".."):
            raise CheckpointError(
                f"{owner}: {INDEX} points outside its folder, to {file!r:.200}. Do not use this model."
            )
    return listed


def check_once(folder: Path, listed: Collection[str], owner: str) -> None:
    """Refuse a model whose weights lie there twice: in the files of an index, and in one that is read before it.

    Args:
        folder: The model's.
        listed: Names of the index's files.
        owner: What to call the model.

    Raises:
        CheckpointError: Nobody can tell which are meant.
    """
    if (folder / SINGLE).exists() and SINGLE not in listed:
        raise CheckpointError(
            f"{owner} holds its weights twice: {SINGLE}, which transformers reads, and the files of its index. Remove "
            "the older ones."
        )
