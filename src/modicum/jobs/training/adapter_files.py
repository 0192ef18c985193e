"""The files of an adapter: how PEFT saves it, the factors that a run started from, and its way to a plain LoRA."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from modicum import processes
from modicum.borders import loads
from modicum.durable import whole_file, write_atomic
from modicum.errors import CheckpointError
from modicum.layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor

    Pairs: TypeAlias = dict[str, tuple[Tensor, Tensor]]  # lora_A and lora_B by module

ORIGIN, GEOMETRY = "adapter_init.json", "adapter_geometry.json"


def factors_in(folder: Path) -> Pairs:
    """Return the factors of a saved adapter by module."""
    from safetensors.torch import load_file

    saved, ends = load_file(folder / ADAPTER_WEIGHTS), [f".lora_{side}.weight" for side in "AB"]
    names = [key.removesuffix(ends[0]) for key in saved if key.endswith(ends[0])]
    return {name.removeprefix(ADAPTER_PREFIX): (saved[name + ends[0]], saved[name + ends[1]]) for name in names}


def cached_start(
    path: Path | None, *, note: Callable[[str], object] = lambda _text: None
) -> tuple[Pairs, dict[str, Tensor]] | None:
    """Return the factors and spectra that an earlier call wrote, as the first process sees them, or ``None``.

    A damaged file is kept aside, and a note says so: the start is found anew.
    """
    if path is None:
        return None
    found = None
    if processes.main() and path.exists() and (found := _read(path)) is None:
        path.replace(path.with_name(f"{path.name}.aside"))
        note(f"{path.name} is damaged: the adapter's start is found anew, and the file kept as {path.name}.aside.")
    # On several machines only the first one may have the file; all must take the same way.
    return processes.broadcast_object(found)


def by_name(factors: Pairs) -> dict[str, Tensor]:
    """Return factors as tensors by module and side."""
    return {
        f"{name}.{side}": t.detach().cpu().contiguous() for name, pair in factors.items() for side, t in zip("AB", pair)
    }


def digest(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the hash of tensors, as a tensor of bytes."""
    import torch

    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        sha.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(sha.digest()), dtype=torch.uint8)


def _hex(digest: Tensor) -> str:
    return bytes(digest.tolist()).hex()


def write_start(path: Path, factors: Pairs, spectra: Mapping[str, Tensor]) -> None:
    """Write what :func:`cached_start` reads, on the first process."""
    from safetensors.torch import save_file

    if not processes.main():
        return
    tensors = by_name(factors) | {f"{name}.S": S.contiguous() for name, S in spectra.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as beside:
        save_file(tensors, beside, metadata={"sha256": _hex(digest(tensors))})


def _read(path: Path) -> tuple[Pairs, dict[str, Tensor]] | None:
    """Return factors and spectra; ``None`` where the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            known = (file.metadata() or {}).get("sha256")  # none in files of earlier versions
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        names = [key.removesuffix(".A") for key in tensors if key.endswith(".A")]
        factors = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
    except (SafetensorError, OSError, KeyError):
        return None
    if known is not None and _hex(digest(tensors)) != known:
        return None
    return factors, {key.removesuffix(".S"): S for key, S in tensors.items() if key.endswith(".S")}


def rewrite(
    folder: Path,
    change: Callable[[dict[str, Tensor], dict[str, Any]], tuple[Mapping[str, Tensor], Mapping[str, Any]]],
) -> None:
    """Put other tensors and another configuration in the place of a saved adapter's.

    Args:
        folder: Where the adapter was saved.
        change: ``(tensors, config) -> (tensors, config)``.
    """
    from safetensors.torch import load_file, save_file

    tensors, config = change(
        load_file(folder / ADAPTER_WEIGHTS), loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    )
    with whole_file(folder / ADAPTER_WEIGHTS) as beside:
        save_file(dict(tensors), beside, metadata={"format": "pt"})
    write_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")


def remove_shift(folder: Path, initial: Pairs) -> None:
    """Rewrite a saved adapter for the original base, at twice the rank."""
    import torch

    from modicum.adapters.serving import without_shift

    shifted: set[str] = set()

    def change(tensors: dict[str, Tensor], config: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        for name, factors in initial.items():
            keys = [f"{ADAPTER_PREFIX}{name}.lora_{side}.weight" for side in "AB"]
            if not all(key in tensors for key in keys):
                raise CheckpointError(f"{folder} has no factors of {name}. Was it saved by this run?")
            made = without_shift((tensors[keys[0]], tensors[keys[1]]), factors)
            tensors |= dict(zip(keys, made))
            shifted.add(f"{ADAPTER_PREFIX}{name}.base_layer.")
        # PEFT adds the base of an embedding or head that has an adapter: here it is the shifted one.
        tensors = {key: t for key, t in tensors.items() if not key.startswith(tuple(shifted))}
        for key, tensor in tensors.items():
            if (side := _padded(key, initial)) is not None:
                tensors[key] = torch.cat([tensor, torch.zeros_like(tensor)], dim=side)
        growth = 2**0.5 if config.get("use_rslora") else 2
        return tensors, config | {
            "r": 2 * config["r"],
            "lora_alpha": growth * config["lora_alpha"],
            "rank_pattern": {key: 2 * rank for key, rank in (config.get("rank_pattern") or {}).items()},
            "alpha_pattern": {key: growth * alpha for key, alpha in (config.get("alpha_pattern") or {}).items()},
            "init_lora_weights": True,
        }

    rewrite(folder, change)


def _padded(key: str, initial: Pairs) -> int | None:
    """Return the dimension of the rank in a factor that left no base, such as an embedding's; ``None`` for the rest."""
    name, _, factor = key.removeprefix(ADAPTER_PREFIX).removesuffix(".weight").rpartition(".")
    side = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}.get(factor)
    return None if name in initial else side
