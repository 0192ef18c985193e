"""The folder of a routed model.

::

    model.safetensors      the dense weights, a plain checkpoint of the host (or several shards with an index)
    experts.safetensors    what the stores wrote (or several shards)
    router.safetensors     the router's numbers
    config.json            the host's configuration, what is known of the experts, the routing, a checksum of each file
"""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file, save_file
from torch import Tensor

from modicum.errors import CheckpointError
from modicum.models.router import Router
from modicum.models.router_fitting import packed, unpacked
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.experts import ExpertSet
from modicum.weights.files import MappedFile, read_header
from modicum.weights.whole import check_parts

if TYPE_CHECKING:
    from modicum.models.routed.config import RoutedConfig

EXPERTS, ROUTER = "experts", "router.safetensors"


def expert_files(folder: Path) -> list[Path]:
    """Return the files that hold the experts."""
    return sorted(path for path in folder.glob(f"{EXPERTS}*.safetensors") if path.is_file())


def weight_files(folder: Path) -> list[Path]:
    """Return every file of numbers in the folder."""
    return sorted(path for path in folder.glob("*.safetensors") if path.is_file())


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of numbers."""
    found = {}
    for path in weight_files(folder):
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_files(folder: Path, expected: Mapping[str, str]) -> None:
    """Refuse a folder whose files are not those that its configuration was written for.

    Raises:
        CheckpointError: A file is missing, extra or changed.
    """
    found = checksums(folder)
    for name in sorted({*found, *expected}):
        if name not in found:
            raise CheckpointError(f"{folder} lacks {name}, which its config.json names. Get the whole folder again.")
        if found[name] != expected.get(name):
            raise CheckpointError(
                f"{folder}: {name} has another checksum than config.json says: it is damaged, or of another host or "
                "build. Get it again, or build the experts again."
            )


def read_experts(folder: Path, config: RoutedConfig) -> ExpertSet | None:
    """Return the experts of a folder, mapped into memory; ``None`` where it has none."""
    about = config.expert_set
    files = expert_files(folder)
    if about is None:
        return None
    check_parts(files, str(folder))
    parts = ChainMap(*map(_mapped, files))
    return ExpertSet(about, Checkpoint(folder), parts)


def _mapped(path: Path) -> dict[str, Tensor]:
    slots, file = read_header(path, owner=path.name), MappedFile(path)
    return {name: file.tensor(slot) for name, slot in slots.items()}


def read_router(folder: Path, config: RoutedConfig) -> Router | None:
    """Return the router of a folder, if it has one."""
    about, route = config.expert_set, config.route
    path = folder / ROUTER
    if about is None or not (path.is_file() or route.kind == "entropy"):
        return None
    tensors = unpacked(load_file(path)) if path.is_file() else {}
    return Router(route.kind, len(about.names), tensors, route.temperature, route.threshold)  # type: ignore[arg-type]


def write_router(folder: Path, router: Router | None) -> None:
    """Write the router's numbers; none, or one without any, leaves no file."""
    (folder / ROUTER).unlink(missing_ok=True)  # it may be another name of a file elsewhere
    if router is not None and (parts := packed(router.tensors, gate=router.threshold is not None)):
        save_file(parts, folder / ROUTER)
