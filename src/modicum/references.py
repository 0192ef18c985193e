"""The local folder that a reference to a model stands for: one rule for recipes and for Python.

A path stands for itself. Downloads and builtin models are the business of :mod:`modicum.jobs.loading`, which this
module imports by name, and only for a reference that is no path: the core itself knows no network.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

RESOLVER = "modicum.jobs.loading.references"


def find_model(reference: str | Path, *, allow_pickle: bool = False, remote_code: bool = False) -> Path:
    """Return the folder or ``.safetensors`` file of a model, fetching or building it when needed.

    Args:
        reference: A path, a Hub id (``org/name``, ``org/name@revision``) or ``builtin:NAME``.
        allow_pickle: Also download pickled weights from the Hub.
        remote_code: Also download the model's own code from the Hub.

    Raises:
        CheckpointError: There is no such path, builtin or Hub repository.
        MissingExtraError: The builtin needs a package that is not installed.
    """
    path = Path(reference).expanduser()
    if path.exists():
        return path
    found: Path = import_module(RESOLVER).resolve_model(reference, allow_pickle=allow_pickle, remote_code=remote_code)
    return found


def beside(folder: Path, reference: str) -> str:
    """Return the reference to an adapter's base, which may be a path relative to the adapter's own folder."""
    path = folder / reference
    return str(path) if reference and path.is_dir() else reference
