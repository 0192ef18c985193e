"""Giving modules of one adapter different ranks, at an unchanged sum."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from modicum.adapters.layers import lora_layers
from modicum.errors import ModicumError


def redistribute(spectra: Mapping[str, Tensor], *, budget: int, most: int | None = None) -> dict[str, int]:
    """Return a rank for each module: the directions that explain most of their own module, over all modules.

    Args:
        spectra: Singular values by module, largest first.
        budget: Sum of the ranks; every module gets at least 1.
        most: Highest rank of a module; ``None`` for no bound but its spectrum.

    Raises:
        ModicumError: The budget is below one per module, or above what the spectra hold.

    Example:
        >>> import torch
        >>> redistribute({"flat": torch.ones(4), "steep": torch.tensor([1.0, 0, 0, 0])}, budget=4)
        {'flat': 3, 'steep': 1}
    """
    bound = {name: min(len(S), most or len(S)) for name, S in spectra.items()}
    if not len(spectra) <= budget <= sum(bound.values()):
        raise ModicumError(f"Cannot share {budget} ranks out over {len(spectra)} modules of these spectra.")
    shares = {name: (S.double().square() / S.double().square().sum()).tolist() for name, S in spectra.items()}
    ranks = dict.fromkeys(shares, 1)
    # Ties go to the module that comes first.
    queue = [(-share[1], order, name) for order, (name, share) in enumerate(shares.items()) if bound[name] > 1]
    heapq.heapify(queue)
    for _ in range(budget - len(ranks)):
        _, order, name = heapq.heappop(queue)
        ranks[name] += 1
        if ranks[name] < bound[name]:
            heapq.heappush(queue, (-shares[name][ranks[name]], order, name))
    return ranks


def change_ranks(peft_model: Any, ranks: Mapping[str, int], *, adapter: str = "default") -> None:
    """Resize the layers of an adapter, keeping each one's scaling; what they held is replaced by a default start."""
    config = peft_model.peft_config[adapter]
    config.init_lora_weights = True
    rank_pattern, alpha_pattern = dict(config.rank_pattern or {}), dict(config.alpha_pattern or {})
    for name, layer in lora_layers(peft_model, adapter).items():
        rank = ranks.get(name, layer.r[adapter])
        if rank == layer.r[adapter]:
            continue
        scaling = layer.scaling[adapter]
        alpha = scaling * (math.sqrt(rank) if config.use_rslora else rank)
        layer.update_layer(adapter, rank, lora_alpha=alpha, config=config)
        rank_pattern[name], alpha_pattern[name] = rank, alpha
    config.rank_pattern, config.alpha_pattern = rank_pattern, alpha_pattern
