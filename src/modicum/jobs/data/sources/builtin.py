"""Text that every Python brings along."""

from __future__ import annotations

import platform
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from modicum.errors import CheckpointError, did_you_mean
from modicum.evaluate.rows import Row
from modicum.jobs.data.section import DataSection
from modicum.registry import source

TEST_SHARE = 10  # the test split holds one document in ten


def _version(_section: DataSection, _name: str) -> Iterator[str]:
    """Yield the version of Python, whose sources these are."""
    yield f"python=={platform.python_version()}"


@source("builtin", inputs=_version)
def builtin(section: DataSection, name: str) -> list[Row]:
    """Return text that is on this machine already: ``builtin:python-stdlib``.

    Args:
        section: ``split`` is read: ``train`` or ``test``, which share no document.
        name: ``python-stdlib``: the sources and documentation topics of the running Python, one row each.

    Raises:
        CheckpointError: There is no such text or split.

    Example:
        >>> from modicum.jobs.data.section import DataSection
        >>> rows = builtin(DataSection(path="builtin:python-stdlib", split="test"), "python-stdlib")
        >>> len(rows) > 50
        True

    Cost:
        Reads about 25 MB of files.
    """
    if name not in TEXTS:
        raise CheckpointError(f"There is no builtin data {name!r}. {did_you_mean(name, TEXTS)}")
    return TEXTS[name](section)


def _python_stdlib(section: DataSection) -> list[Row]:
    from pydoc_data.topics import topics

    from modicum.random import derive_seed

    if section.split not in ("train", "test"):
        raise CheckpointError(f"{section.path} has the splits train and test, got {section.split!r}.")
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "lib-dynload"}
    files = {"/".join(file.relative_to(root).parts): file for file in root.rglob("*.py")}
    documents: dict[str, Path | str] = {f"topic/{topic}": text for topic, text in topics.items()}
    # Build settings differ from machine to machine; the rest depends on the version of Python alone.
    documents |= {
        name: file
        for name, file in files.items()
        if left_out.isdisjoint(name.split("/")) and not file.name.startswith("_sysconfigdata")
    }
    held_out = section.split == "test"
    chosen = [
        document for name, document in sorted(documents.items()) if (derive_seed(0, name) % TEST_SHARE == 0) == held_out
    ]
    texts = (d if isinstance(d, str) else d.read_text(encoding="utf-8", errors="replace") for d in chosen)
    return [{section.fields.text: text} for text in texts if text.strip()]


TEXTS: Mapping[str, Callable[[DataSection], list[Row]]] = MappingProxyType({"python-stdlib": _python_stdlib})
