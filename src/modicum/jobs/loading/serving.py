"""An adapter's folder in the form that servers such as vLLM load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.durable import whole_folder, write_atomic
from modicum.errors import CheckpointError, UnsupportedError
from modicum.layout import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from torch import Tensor


def export_adapter(source: str | Path, out: str | Path) -> dict[str, Any]:
    """Write an adapter that servers load: one rank, one scaling, no patterns; its effect is checked to be the same.

    Args:
        source: Folder of a LoRA adapter.
        out: Folder to write; must not exist.

    Returns:
        ``rank`` (what a server's limit must allow), ``alpha`` and the number of ``modules``.

    Raises:
        UnsupportedError: The adapter is more than two factors for each module (DoRA, saved modules, biases).
        CheckpointError: It cannot be read, or ``out`` exists.
    """
    from safetensors.torch import save_file

    from modicum.adapters.serving import alpha_for, uniform
    from modicum.weights.adapter import Adapter

    source, out = Path(source), Path(out)
    if out.exists():
        raise CheckpointError(f"{out} exists already. Choose another folder.")
    read = Adapter(source, owner=str(source))
    if read.replaced or read.config.get("modules_to_save"):
        what = next(iter(read.replaced), "modules_to_save")
        raise UnsupportedError(
            f"{source} also replaces {what!r}, which servers refuse. Merge it into its base instead."
        )
    if start := next((change.start for change in read.factors.values() if change.start), None):
        raise UnsupportedError(
            f"{source} is added to what {start} left of its base, not to the base itself. Merge it into its base."
        )
    if targets := read.config.get("target_parameters"):
        raise UnsupportedError(f"{source} targets parameters ({targets[0]}), which servers refuse. Merge it instead.")
    rank = max(change.A.shape[0] for change in read.factors.values())
    own = read.config["lora_alpha"] / read.config["r"] ** (0.5 if read.config.get("use_rslora") else 1.0)
    # A whole alpha at the adapter's own scaling keeps the other modules' bytes as they are.
    scaling = own if float(alpha_for(own, rank)).is_integer() else 1.0
    made = uniform({name: (f.A, f.B, f.scale) for name, f in read.factors.items()}, scaling=scaling)
    alpha = int(alpha_for(scaling, rank))
    config = read.config | {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "init_lora_weights": True,
    }
    tensors: dict[str, Tensor] = {}
    for name, (A, B) in made.items():
        module = ADAPTER_PREFIX + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": A.contiguous(), f"{module}.lora_B.weight": B.contiguous()}
    with whole_folder(out) as folder:
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        write_atomic(folder / ADAPTER_CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")
    return {"rank": rank, "alpha": alpha, "modules": len(made)}
