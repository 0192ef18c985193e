"""Whether a model's folder holds all of it: the parts of its weights, and the layers that its configuration counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modicum.architectures import shares_layers
from modicum.errors import CheckpointError, is_text
from modicum.layout import layer_of, modules
from modicum.weights.configs import depth_keys, drafts, text_of

PART = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{1,6})-of-(?P<total>[0-9]{1,6})\.\w+")


def check_parts(files: Sequence[Path], owner: str) -> None:
    """Refuse some of the files that weights were cut into, where the others are not there.

    Args:
        files: All files of weights that are there, without an index.
        owner: What to call the model.

    Raises:
        CheckpointError: One is missing.
    """
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if part := PART.fullmatch(file.name):
            found.setdefault((part["stem"], int(part["total"])), set()).add(int(part["number"]))
    for (stem, total), numbers in found.items():
        if len(numbers) < total:
            raise CheckpointError(
                f"{owner} holds {len(numbers)} of the {total} files {stem}-…-of-{total:05}. Download the others too."
            )


def check_layers(names: Iterable[str], config: Mapping[str, Any], owner: str) -> None:
    """Refuse weights that are not those of the layers that ``config.json`` counts.

    Layers that draft further tokens come after those, and files may leave them out. The layers of encoders and decoders
    follow each other without a gap.

    Args:
        names: The tensors.
        config: What ``config.json`` holds.
        owner: What to call the model.

    Raises:
        CheckpointError: A layer is missing, or there are too many.
    """
    if not config or "auto_map" in config or shares_layers(str(config.get("model_type"))):
        return  # which layers such a class has is its own business
    places = modules(listed := list(names))
    found: dict[str, dict[str, set[int]]] = {}  # the layers of each stack, by the module that it is part of
    for name in listed:
        if layer := layer_of(name):
            found.setdefault(places[name], {}).setdefault(layer.stack, set()).add(layer.number)
    for stack, numbers in (found.get("encoder", {}) | found.get("decoder", {})).items():
        if (gap := _first_gap(numbers)) is not None:
            raise CheckpointError(f"{owner}: there is no {stack}.{gap}, and there are later ones. Download it again.")
    text, own = text_of(config), found.get("text_decoder", {})
    counted = {text[key] for stack in own for key in depth_keys(text, stack) if isinstance(text.get(key), int)}
    if len(counted) != 1 or not own:
        return
    depth = counted.pop()
    if any(_first_gap(each) is None and len(each) - drafts(config, len(each)) == depth for each in own.values()):
        return
    stack, numbers = max(own.items(), key=lambda item: len(item[1]))
    lost = sorted(set(range(min(depth, len(numbers) + 1))) - numbers)
    told = f"there is no {stack}.{lost[0]}" if lost else f"there is a {stack}.{max(numbers)}"
    raise CheckpointError(
        f"{owner}: its config.json counts {depth} layers, and {told}. Download it again, or correct config.json."
    )


def _first_gap(numbers: set[int]) -> int | None:
    return next((number for number in range(len(numbers)) if number not in numbers), None)


def inside(path: Path, owner: str) -> Path:
    """Return a file of a model's folder that may be copied into results: no link to somewhere else, and with a name.

    The Hub's cache keeps files in a folder of its own, beside that of their links.

    Raises:
        CheckpointError: It leads out of the folder, or its name is no text.
    """
    if not is_text(path.name):
        raise CheckpointError(f"{owner}: the name of the file {path.name!r} is not UTF-8. Rename or remove it.")
    target, folder = path.resolve(), path.parent.resolve()
    cache = folder.parent.parent / "blobs" if folder.parent.name == "snapshots" else folder
    if folder not in target.parents and cache not in target.parents:
        raise CheckpointError(f"{owner}: {path.name} is a link to {target}, outside its folder. Copy the file there.")
    return path
