"""The folder of a model or an adapter, checked before ``transformers`` or PEFT see it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import borders
from modicum.errors import CheckpointError, first_line
from modicum.jobs.loading.references import PICKLES
from modicum.layout import ADAPTER_CONFIG
from modicum.references import beside, pinned

if TYPE_CHECKING:
    from modicum.record import Run


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is a PEFT adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_base(folder: Path) -> str:
    """Return the reference of the base model that the adapter in ``folder`` was trained on."""
    config = read_json(folder / ADAPTER_CONFIG)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise CheckpointError(f"{folder}/adapter_config.json does not say base_model_name_or_path. Set it there.")
    return pinned(beside(folder, base), revision)


def note_code(models: Iterable[object], run: Run) -> None:
    """Note which opened model's own code does not come along to what is made of it."""
    from modicum.weights.checkpoint import Checkpoint

    for model in models:
        if isinstance(model, Checkpoint) and model.config.get("auto_map") and not model.remote_code:
            run.note(f"{model.name} comes with code of its own, which is left out. remote_code: true carries it along.")
            return


def check_weights(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise unless ``folder`` holds readable weights that all lie inside it.

    Raises:
        CheckpointError: Weights are missing, pickled, truncated or outside the folder.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        if outside := [name for name in names if Path(name).name != name]:
            raise CheckpointError(f"{index} points outside its folder, to {outside[0]!r}. This is not a sound model.")
        shards = [folder / name for name in names]
        if missing := [shard.name for shard in shards if not shard.is_file()]:
            raise CheckpointError(f"{folder} lacks {missing[0]}, which its index names. Copy or download it again.")
    else:
        shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
        if pickles and not allow_pickle:
            raise CheckpointError(
                f"{folder} holds only pickled weights ({pickles[0]}), which can run code when read. "
                "Convert them to safetensors, or set allow_pickle: true if you trust their source."
            )
        if not pickles:
            raise CheckpointError(f"{folder} holds no weights, expected *.safetensors.")
    for shard in shards:
        try:
            with safe_open(shard, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is corrupt or cut short ({first_line(error)}) Get it again.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file of a model's folder."""
    return borders.read_json(path, str(path.parent))
