"""The folder of a model or an adapter, checked before ``transformers`` or PEFT see it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum import borders
from modicum.errors import CheckpointError, first_line
from modicum.jobs.loading.references import PICKLES, resolve_model
from modicum.layout import ADAPTER_CONFIG, INDEX
from modicum.patterns import try_pattern
from modicum.references import beside, on_itself, pinned

if TYPE_CHECKING:
    from modicum.record import Run

SMALL = 10_000_000  # numbers for which room is made without a look at the weights
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers")
WIDTHS = ("hidden_size", "n_embd", "d_model")
SIDES = ("vocab_size", "intermediate_size", "n_inner", "ffn_dim")
HEADS = ("num_attention_heads", "num_key_value_heads", "n_head")


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is a PEFT adapter rather than a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def beneath(folder: Path, *, allow_pickle: bool = False, remote_code: bool = False) -> Iterator[Path]:
    """Yield the folder, and where it is an adapter what that was trained on, down to a whole model.

    Args:
        folder: Of a model or an adapter.
        allow_pickle: Also download pickled weights from the Hub.
        remote_code: Also download the model's own code from the Hub.

    Raises:
        CheckpointError: An adapter names no base, one that is not there, or itself.
    """
    seen: list[Path] = []
    while True:
        yield folder
        if not is_adapter(folder):
            return
        seen.append(folder.resolve())
        folder = resolve_model(adapter_base(folder), allow_pickle=allow_pickle, remote_code=remote_code)
        if folder.resolve() in seen:
            raise on_itself(folder)


def adapter_base(folder: Path) -> str:
    """Return what an adapter says it was trained on: a path that is there, or the name that it gives."""
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


def try_patterns(config: Mapping[str, Any], model: Any, owner: str) -> None:
    """Match the regular expressions of an adapter's configuration with the model's layers, as PEFT will.

    Args:
        config: Fields of ``peft.LoraConfig``.
        model: The base, whose modules PEFT looks through.
        owner: Whose configuration it is.

    Raises:
        RecipeError: One is malformed, or takes longer than any honest one.
    """
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), str):
            try_pattern(config[key], names, f"{owner}: {key}")
    layers = config.get("layers_pattern")
    for pattern in [layers] if isinstance(layers, str) else layers or []:
        try_pattern(pattern, names, f"{owner}: layers_pattern", around=r".*\.{}\.(\d+)\.")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in config.get(key) or {}:
            try_pattern(pattern, names, f"{owner}: {key}", around=r"(.*\.)?({})$")


def check_weights(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise unless ``folder`` holds readable weights that all lie inside it.

    Raises:
        CheckpointError: Weights are missing, pickled, truncated or outside the folder.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / INDEX
    if index.is_file():
        names = sorted(set(borders.read_index(folder, str(folder)).values()))
        shards = [folder / name for name in names]
        if missing := [shard.name for shard in shards if not borders.is_file(shard)]:
            raise CheckpointError(
                f"{folder} lacks {missing[0]:.200}, which its index names. Copy or download it again."
            )
        if not isinstance(read_json(index).get("metadata"), dict):
            raise CheckpointError(f"{index} has no metadata, which transformers reads. Download it again.")
        borders.check_once(folder, names, str(folder))
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
    tensors = entries = 0
    for shard in shards:
        borders.check_plain(shard)
        try:
            with safe_open(shard, "pt") as file:
                names = file.keys()
                tensors += len(names)
                entries += sum(math.prod(file.get_slice(name).get_shape()) for name in names)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is corrupt or cut short ({first_line(error)}) Get it again.") from None
    if shards and (folder / "config.json").is_file():
        check_sizes(read_json(folder / "config.json"), str(folder), tensors, entries)


def check_sizes(config: Mapping[str, Any], owner: str, tensors: int, entries: int) -> None:
    """Refuse a configuration of a model much larger than what there is of it, before room is made for that.

    Args:
        config: Content of ``config.json``.
        owner: Whose it is.
        tensors: How many tensors there are, or may be.
        entries: How many numbers they hold, or may hold.

    Raises:
        CheckpointError: It asks for more layers than there are tensors, or for a tensor larger than all together.
    """
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        known = {
            key: part[key] for key in (*LAYERS, *WIDTHS, *SIDES, *HEADS, "head_dim") if isinstance(part.get(key), int)
        }
        width = max((known[key] for key in WIDTHS if key in known), default=1)
        heads = [known[key] * known.get("head_dim", 1) for key in HEADS if key in known]
        sides = [*(known[key] for key in SIDES if key in known), *heads]
        asked = [(key, known[key], tensors) for key in LAYERS if key in known]
        asked += [("the largest tensor", width * side, 4 * entries + SMALL) for side in (width, *sides)]
        for what, size, most in asked:
            if size > most:
                raise CheckpointError(
                    f"{owner}: its config.json asks for {size:.2e} ({what}), and there are {tensors} tensors of "
                    f"{entries:.2e} numbers in all. Download it again."
                )


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file of a model's folder."""
    return borders.read_json(path, str(path.parent))
