"""Checkpoints that a Trainer left behind: which are whole, and from which a run goes on.

A checkpoint is whole when its manifest, which is written last, is there and every file that it lists has the size and
the content that the manifest says. Checkpoints of earlier versions have no manifest: their files are looked at by
their ends.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from modicum.borders import loads
from modicum.content import hash_files
from modicum.durable import remove, sync, sync_tree, write_atomic
from modicum.errors import CheckpointError
from modicum.record import digest

MANIFEST = "manifest.json"
STATE = "trainer_state.json"  # the last file that the Trainer writes
MEMORY = "parts-{rank}.state"  # what training parts remember, in the format of safetensors
WRITER = "CheckpointCallback"  # named in the Trainer's state where a manifest is going to follow
# Files and folders with weights: a model's or adapter's in one file or several, FSDP's folder, DeepSpeed's by step.
WEIGHTS = ("*model*", "global_step*")


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders called ``checkpoint-<step>``, by step; names of any other form are the user's own.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> for name in ("checkpoint-10", "checkpoint-9", "checkpoint-10-backup", "checkpoint-best"):
        ...     (folder / name).mkdir()
        >>> [path.name for path in checkpoints(folder)]
        ['checkpoint-9', 'checkpoint-10']
    """
    found = {}
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(0|[1-9][0-9]*)", path.name)
        if step and path.is_dir():
            found[int(step[1])] = path
    return [found[step] for step in sorted(found)]


def last_checkpoint(
    folder: Path, *, best: bool = False, passed: Callable[[Path, str], object] = lambda _path, _why: None
) -> Path | None:
    """Return the newest whole checkpoint.

    Args:
        folder: Where the checkpoints are.
        best: The run will end with its best weights: a checkpoint is of use only with the one that it names as best.
        passed: Called with each newer checkpoint, and with what is wrong with it.
    """
    for path in reversed(checkpoints(folder)):
        why = trouble(path) or (_trouble_of_best(path) if best else None)
        if why is None:
            return path
        passed(path, why)
    return None


def trouble(path: Path) -> str | None:
    """Return what is wrong with a checkpoint; ``None`` for a whole one."""
    manifest = read_manifest(path)
    if manifest is None:
        return _trouble_by_ends(path)
    if not manifest:
        return f"{MANIFEST} is damaged"
    for name, kept in manifest["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (size := (path / name).stat().st_size) != kept["bytes"]:
            return f"{name} has {size} bytes, and had {kept['bytes']}"
    try:
        found = hash_files([path / name for name in manifest["files"]], cached=False)
    except CheckpointError as error:
        return str(error).rstrip(".")
    for name, kept in manifest["files"].items():
        if found[path / name] != kept["xxh3"]:
            return f"{name} has another content than was saved"
    return None


def set_aside(path: Path, why: str) -> str:
    """Give a checkpoint that is not whole another name, so that it is kept and not used; return what was done.

    A checkpoint that was still being written when the run was killed is deleted.
    """
    begun = not (path / STATE).exists() or any(path.glob(f".{MANIFEST}.*"))  # the manifest is what is written last
    if begun and not (path / MANIFEST).exists() and not path.is_symlink():
        remove(path)
        return f"{path.name} was not finished when the run was killed, and is deleted."
    target, number = path.with_name(f"{path.name}.aside"), 1
    while target.exists() or target.is_symlink():
        number += 1
        target = path.with_name(f"{path.name}.aside-{number}")
    path.rename(target)
    return f"{path.name} is not whole ({why}): it is not used, and kept as {target.name}."


def begin_manifest(path: Path) -> None:
    """Leave a sign that a checkpoint is still being written, which the manifest takes the place of."""
    path.mkdir(parents=True, exist_ok=True)
    (path / f".{MANIFEST}.{os.getpid()}").touch()  # where write_atomic writes


def write_manifest(path: Path, *, processes: int) -> None:
    """Write down every file of a checkpoint, its size and its hash, once they are on the disk: the last act of saving.

    Args:
        path: The checkpoint.
        processes: That share the run.
    """
    (path / MANIFEST).unlink(missing_ok=True)
    sync_tree(path)
    sync(path.parent)
    begun = f".{MANIFEST}."
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(begun))
    hashes = hash_files([*files], cached=False)
    kept = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "xxh3": value}
        for file, value in hashes.items()
    }
    manifest = {"processes": processes, "files": kept}
    write_atomic(path / MANIFEST, json.dumps(manifest | {"hash": digest(manifest)}, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest; ``None`` where there is none, and an empty one where it cannot be read."""
    try:
        manifest: dict[str, Any] = loads((path / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest.pop("hash") == digest(manifest) else {}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def rotate(folder: str | Path, limit: int, *, best: str | None = None) -> None:
    """Delete the oldest checkpoints until ``limit`` are left; the newest and the best one always stay."""
    found = checkpoints(Path(folder))
    kept = {found[-1], Path(best)} if found and best else set(found[-1:])
    spare = [path for path in found if path not in kept]
    for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
        with suppress(OSError):
            remove(path)


def _state(path: Path) -> dict[str, Any] | None:
    try:
        state = loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # no file, not UTF-8, or not JSON
        return None
    return state if isinstance(state, dict) and "global_step" in state else None


def _trouble_of_best(path: Path) -> str | None:
    """Return what is wrong with the checkpoint that another one names as the best."""
    step = (_state(path) or {}).get("best_global_step")
    best = path.with_name(f"checkpoint-{step}")
    if not step or best == path:
        return None
    why = trouble(best) if best.is_dir() else "it is missing"
    return f"{best.name}, the best one by then, is not whole: {why}" if why else None


def _trouble_by_ends(path: Path) -> str | None:
    """Return what is wrong with a checkpoint without a manifest, as far as the ends of its files tell."""
    state = _state(path)
    if state is None:
        return f"{STATE} is missing or damaged"
    if WRITER in (state.get("stateful_callbacks") or {}):
        return f"{MANIFEST} is missing"
    if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        return "its weights are missing"
    return next((f"{file.name} is damaged" for file in sorted(path.iterdir()) if not _reads(file)), None)


def _reads(file: Path) -> bool:
    """Whether a file was written to its end, as far as its format tells without reading it all."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt"):  # compares the header to the size of the file
                return True
        except (OSError, SafetensorError):
            return False
    # torch.save writes zip archives, whose table of contents is their end.
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)
