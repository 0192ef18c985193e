"""Checkpoints that a Trainer left behind: which are whole, and from which a run goes on."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

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


def last_checkpoint(folder: Path, *, delete_broken: bool) -> Path | None:
    """Return the newest whole checkpoint; broken ones after it are deleted where asked, since they are made anew."""
    for path in reversed(checkpoints(folder)):
        if _is_whole(path):
            return path
        if delete_broken and not path.is_symlink():
            shutil.rmtree(path)
    return None


def rotate(folder: str | Path, limit: int, *, best: str | None = None) -> None:
    """Delete the oldest checkpoints until ``limit`` are left; the newest and the best one always stay."""
    found = checkpoints(Path(folder))
    kept = {found[-1], Path(best)} if found and best else set(found[-1:])
    spare = [path for path in found if path not in kept]
    for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
        shutil.rmtree(path, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Whether a checkpoint can be read: its state, which the trainer writes last, and the ends of its files."""
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no file, not UTF-8, or not JSON
        return False
    if not isinstance(state, dict) or "global_step" not in state:
        return False
    if not any(next(path.glob(pattern), None) for pattern in WEIGHTS):
        return False
    return all(_reads(file) for file in path.iterdir())


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
