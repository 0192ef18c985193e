"""Find a model by reference: a local folder, a Hub id, or a ``builtin:`` one that is built in the user's cache."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

from modicum.borders import check_plain_folder, expanded
from modicum.content import cache_folder
from modicum.durable import follow_umask, sync, sync_tree
from modicum.errors import CheckpointError, did_you_mean, first_line

PICKLES = ("*.bin", "*.pt", "*.pth")
WEIGHTS = "*.safetensors"
HUB_FILES = (WEIGHTS, "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
# Raise the revision whenever the builder makes other bytes, so that an old cache is not taken for the new one.
# The builder is the function `build` of a module in `builtins`.
BUILTINS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"byte-llama": ("r1", "byte_llama"), "smollm2-135m-instruct": ("r1", "smollm2")}
)


def resolve_model(
    ref: str | Path, *, allow_pickle: bool = False, remote_code: bool = False, weights: bool = True
) -> Path:
    """Return the local folder of a model, fetching or building it when needed.

    Args:
        ref: A folder, ``builtin:NAME``, or a Hub id (``org/name``, ``org/name@revision``).
        allow_pickle: Also download pickled weights from the Hub.
        remote_code: Also download the model's own code from the Hub.
        weights: Download its weights from the Hub.

    Raises:
        CheckpointError: There is no such folder, builtin or Hub repository.
        MissingExtraError: The builtin needs a package that is not installed.
    """
    text = str(ref)
    kind, colon, name = text.partition(":")
    if colon and kind == "builtin":
        if name not in BUILTINS:
            raise CheckpointError(f"There is no builtin model {name!r}. {did_you_mean(name, BUILTINS)}")
        return _built(name)
    if colon and kind == "stage":
        raise CheckpointError(f"{text} names a stage, which only a later stage of the same pipeline can read.")
    folder = expanded(text)
    if folder.is_dir():
        check_plain_folder(folder)
        return folder
    if folder.exists():
        raise CheckpointError(f"{text} is a file, expected the folder of a model.")
    if _is_path(text):
        raise CheckpointError(f"There is no model folder {text}. Check the path.")
    return _download(text, allow_pickle=allow_pickle, remote_code=remote_code, weights=weights)


def model_and_adapter(reference: str) -> tuple[str, str | None]:
    """Take ``model+adapter`` apart, unless the whole is the name of a folder.

    Raises:
        CheckpointError: One of the two is empty.

    Example:
        >>> model_and_adapter("org/model+org/adapter"), model_and_adapter("org/model")
        (('org/model', 'org/adapter'), ('org/model', None))
    """
    model, plus, adapter = reference.partition("+")
    if not plus or expanded(reference).exists():
        return reference, None
    if not model or not adapter:
        raise CheckpointError(f"{reference!r} names no {'adapter' if model else 'model'}, expected model+adapter.")
    return model, adapter


def revision_of(reference: str) -> str:
    """Return a reference with what tells its versions apart: a builtin's revision, the commit of a Hub id.

    Example:
        >>> revision_of("builtin:byte-llama"), revision_of("python==3.13")
        ('builtin:byte-llama r1', 'python==3.13')
    """
    kind, _, name = reference.partition(":")
    if kind == "builtin" and name in BUILTINS:
        return f"{reference} {BUILTINS[name][0]}"
    if kind == "dataset":
        return f"{reference} {hub_commit(name, 'dataset')}".rstrip()
    return reference if _is_path(reference) else f"{reference} {hub_commit(reference, 'model')}".rstrip()


def hub_commit(reference: str, kind: str) -> str:
    """Return the commit that a Hub id (``org/name``, ``org/name@revision``) stands for; empty where nobody tells.

    Args:
        reference: The id.
        kind: ``model`` or ``dataset``.
    """
    name, _, revision = reference.partition("@")
    revision = revision or "main"
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return ""
    from huggingface_hub import HfApi, constants

    try:
        return str(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=10).sha or "")
    except Exception:  # offline, unknown or private, in whatever words: what an earlier download noted counts then
        folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
        try:
            return (folder / "refs" / revision).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            return revision if (folder / "snapshots" / revision).is_dir() else ""


def _is_path(text: str) -> bool:
    """Whether a reference is written like a path: a Hub id is ``name`` or ``org/name``."""
    folder = expanded(text)
    # What lies in a folder that exists is a path, too.
    inside = folder.parent != Path() and folder.parent.is_dir()
    return inside or folder.is_absolute() or text.startswith((".", "~")) or len(folder.parts) > 2


def _download(ref: str, *, allow_pickle: bool, remote_code: bool, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = ref.partition("@")
    patterns = [*HUB_FILES, *(PICKLES if allow_pickle else ()), *(["*.py"] if remote_code else ())]
    if not weights:
        patterns = [pattern for pattern in patterns if pattern != WEIGHTS]
    try:
        with no_progress_bars():
            return Path(
                snapshot_download(
                    name,
                    revision=revision or None,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*", "consolidated*"],  # other formats of the same weights
                )
            )
    except HFValidationError:
        raise CheckpointError(f"There is no model folder {ref}, and it is not a Hub id (org/name).") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"There is no folder {ref}, and the Hub gave no model of that name: {first_line(error)} "
            "Check the path, or the Hub's name and the network."
        ) from None


def _built(name: str) -> Path:
    """Return the cached folder of a builtin model, building it beside and renaming it when it is whole."""
    revision, module = BUILTINS[name]
    folder = cache_folder() / "models" / f"{name}-{revision}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder.parent, f".{name}-*")
        partial = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    except OSError as error:
        raise _cannot_cache(folder.parent, error) from None
    try:
        with no_progress_bars():
            import_module(f"{__package__}.builtins.{module}").build(partial)
        follow_umask(partial)
        sync_tree(partial)
        try:
            partial.rename(folder)
            sync(folder.parent)
        except OSError:
            # Another process was faster; its folder is the same as ours.
            if not (folder / "config.json").is_file():
                raise
    except OSError as error:
        raise _cannot_cache(folder.parent, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _remove_leftovers(folder: Path, pattern: str) -> None:
    """Remove what a killed build left; one that is under way is younger than an hour."""
    for path in folder.glob(pattern):
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path, ignore_errors=True)


def _cannot_cache(folder: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"Cannot write the model cache {folder}: {error.strerror or error}. "
        "Set MODICUM_CACHE to a folder with about 300 MB of space."
    )


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep the libraries' own bars off the terminal: modicum draws one per job."""
    from transformers.utils import logging

    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
