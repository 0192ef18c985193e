"""Which folders the ``checkpoints`` of a recipe stand for, and in which order."""

from __future__ import annotations

import glob
import os
import re
from decimal import Decimal
from itertools import zip_longest
from pathlib import Path

from modicum.borders import expanded
from modicum.errors import CheckpointError
from modicum.jobs.training.checkpoints import checkpoints as saved_in
from modicum.layout import natural

_DECIMAL = r"(?<![\d.])\d+\.(\d+)(?!\.?\d)"  # what follows the point


def find_checkpoints(patterns: list[str]) -> list[str]:
    """Return the folders that ``patterns`` stand for; those of one pattern in the order of the numbers in their paths.

    A folder that holds ``checkpoint-<step>`` stands for all of them, unless it is a model itself and listed beside
    others. A folder that is there under its very name is meant, brackets and all.

    Raises:
        CheckpointError: A pattern matches nothing, or its matches have no order.
    """
    found: list[str] = []
    for pattern in patterns:
        folder = expanded(pattern)
        if not glob.has_magic(pattern) or _is_there(folder):
            meant = len(patterns) > 1 and _is_model(folder)
            found += [str(path) for path in ([] if meant else saved_in(folder))] or [pattern]
            continue
        matches = [path for path in glob.glob(_escaped(folder)) if Path(path).is_dir()]  # noqa: PTH207
        if not matches:
            raise CheckpointError(f"No folder matches {pattern}. Check the path, and that the run saved checkpoints.")
        found += in_order(matches, pattern)
    return found


def _is_there(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110 - of a name that no file can have it says no


def _escaped(path: Path) -> str:
    """Return a pattern in which the folders that are there under its very names stand for themselves."""
    known = Path()
    for place, part in enumerate(path.parts):
        if not _is_there(known / part):
            return str(Path(glob.escape(str(known)), *path.parts[place:]))
        known /= part
    return glob.escape(str(known))


def note_on_folders(patterns: list[str]) -> list[str]:
    """Say where the folder of a run holds a model of its own beside its checkpoints, which is not averaged."""
    folder = expanded(patterns[0])
    if len(patterns) > 1 or not _is_model(folder) or not (saved := saved_in(folder)):
        return []
    return [f"{patterns[0]} stands for its {len(saved)} checkpoints; the model beside them is left out"]


def in_order(paths: list[str], pattern: str) -> list[str]:
    """Return folders by the numbers in those parts of their paths in which they differ.

    Numbers with a point are decimals, as of epochs, but for those with two points and more, as of versions.

    Example:
        >>> in_order(["runs/b-10/model", "runs/a-2/model"], "runs/*/model")
        ['runs/a-2/model', 'runs/b-10/model']
        >>> in_order(["epoch-0.5", "epoch-1.5", "epoch-1.25"], "epoch-*")
        ['epoch-0.5', 'epoch-1.25', 'epoch-1.5']

    Raises:
        CheckpointError: Some have a number there and some have none, or 1.10 may be above or below 1.9.
    """
    parts = list(zip_longest(*(Path(path).parts for path in paths), fillvalue=""))
    varying = [texts for texts in parts if len(set(texts)) > 1]
    numbers = {path: [n for texts in varying for n in _numbers_in(texts[i])] for i, path in enumerate(paths)}
    fractions = {part for texts in varying for text in texts for part in re.findall(_DECIMAL, text)}
    odd = [part for part in fractions if part.endswith("0") and part != "0"]
    if odd and len(set(map(len, fractions))) > 1:
        raise CheckpointError(
            f"{pattern} matches numbers with .{min(odd)} beside others of fewer or more digits, so that they may be "
            "decimals or versions. List the folders, oldest first."
        )
    bare = [path for path in paths if not numbers[path]]
    if 0 < len(bare) < len(paths):
        raise CheckpointError(
            f"{pattern} matches {bare[0]}, which has no number among numbered ones. List the folders, oldest first."
        )
    return sorted(paths, key=lambda path: (numbers[path], natural(path)))


def _numbers_in(text: str) -> list[Decimal]:
    found = re.findall(r"\d+(?:\.\d+)*", text)
    return [Decimal(n) for each in found for n in ([each] if each.count(".") < 2 else each.split("."))]


def _is_model(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "*model*.bin"))
