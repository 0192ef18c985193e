"""The local folder that a reference to a model stands for: one rule for recipes and for Python.

A path stands for itself. Downloads and builtin models are the business of :mod:`modicum.jobs.loading`, which this
module imports by name, and only for a reference that is no path: the core itself knows no network.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from modicum.borders import expanded
from modicum.errors import CheckpointError
from modicum.layout import ADAPTER_CONFIG

CONVERTED = "base"  # what a training calls the model that it converted, beside the adapter on it
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
    path = expanded(reference)
    if path.exists():
        return path
    found: Path = import_module(RESOLVER).resolve_model(reference, allow_pickle=allow_pickle, remote_code=remote_code)
    return found


def revision_of(reference: str) -> str:
    """Return a reference with what tells its versions apart; a reference that has none stands for itself.

    Args:
        reference: A Hub id gets the commit that its revision stands for now, a builtin model its own revision.
    """
    found: str = import_module(RESOLVER).revision_of(reference)
    return found


def beside(folder: Path, reference: str) -> str:
    """Return the reference to an adapter's base, which may be a path relative to the adapter's own folder.

    The folder ``base`` of a run may have been moved along with the adapter.
    """
    path, moved = folder / reference, folder.parent / CONVERTED
    if Path(reference).is_absolute() and path.name == CONVERTED and not path.is_dir() and moved.is_dir():
        path = moved
    return str(path) if reference and path.is_dir() else reference


def on_itself(folder: Path) -> CheckpointError:
    """Return the error of an adapter whose base is the adapter itself, or one that stands on it."""
    return CheckpointError(
        f"{folder}: the adapter names itself as its base. Set base_model_name_or_path in its {ADAPTER_CONFIG} to the "
        "model that it was trained on."
    )


def pinned(reference: str, revision: str | None) -> str:
    """Return a Hub id with its revision, as :func:`find_model` takes both; a path stands for itself.

    Example:
        >>> pinned("org/name", "v2"), pinned("org/name", None)
        ('org/name@v2', 'org/name')
    """
    return f"{reference}@{revision}" if reference and revision and not Path(reference).exists() else reference
