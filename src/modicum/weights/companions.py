"""The files of a result besides its weights: what it takes over from a model, changed where it is another one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from modicum.errors import RecipeError
from modicum.weights.checkpoint import Checkpoint
from modicum.weights.compatibility import Tensors
from modicum.weights.configs import rewritten
from modicum.weights.mergekit.tokenizers import Converter
from modicum.weights.mergekit.vocabulary import Result, with_vocabulary


def companion_files(model: Checkpoint, dtype: torch.dtype | None = None, **changes: Any) -> dict[str, bytes]:
    """Return the files that a result takes over from ``model``, with ``config.json`` telling the truth about it."""
    found = {path.name: path.read_bytes() for path in model.companions()}
    if model.rows is not None:
        changes = {"vocab_size": model.rows} | changes
    if "config.json" in found and (dtype is not None or changes):
        kind = None if dtype is None else str(dtype).removeprefix("torch.")
        config = rewritten(json.loads(found["config.json"]), dtype=kind, **changes)
        found["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
    return found


def unified(
    tokenizer: str | Mapping[str, Any],
    models: Sequence[Tensors],
    names: Sequence[str],
    find: Callable[[str], Path],
    convert: Converter | None,
) -> Result:
    """Bring the vocabularies of checkpoints together, by the setting of a mergekit file."""
    opened = {name: model for name, model in zip(names, models) if isinstance(model, Checkpoint)}
    if len(opened) < len(models):
        raise RecipeError("tokenizer brings vocabularies together, of which tensors in memory have none. Remove it.")
    return with_vocabulary({"tokenizer": tokenizer}, opened, names[0], find=find, convert=convert)
