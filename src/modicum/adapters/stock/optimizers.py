r"""Baselines that train LoRA with an optimiser of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.drawn import default
from modicum.adapters.hrp import Factors
from modicum.registry import adapter_init
from modicum.types import PositiveInt


def _faster_b(peft_model: Any, knobs: Mapping[str, Any], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    made: torch.optim.Optimizer = create_loraplus_optimizer(
        peft_model, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=knobs["ratio"], loraplus_weight_decay=weight_decay
    )
    return made


@adapter_init(
    "lora_plus",
    paper="arXiv:2402.12354",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    stock=True,
    optimizer=_faster_b,
)
def lora_plus(
    weight: Float[Tensor, "out in"],
    *,
    rank: PositiveInt,
    ratio: Annotated[float, Ge(1)] = 16.0,
    rng: torch.Generator | None = None,
) -> Factors:
    r"""Train B with a larger learning rate than A.

    .. math::
        \eta_B = \lambda\, \eta_A

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank of the adapter.
        ratio: The ratio lambda of the two rates, which the optimiser reads.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), those of ``default``.

    Example:
        >>> lora_plus(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        None.

    Deviates:
        The optimiser is PEFT's: AdamW, and for adapters on embeddings a rate of 1e-6 whatever ``lr`` is.

    Reference:
        Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv:2402.12354.
    """
    del ratio  # read by the optimiser
    return default(weight, rank=rank, rng=rng)


def _projected_b(peft_model: Any, _: Mapping[str, Any], *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    from peft.optimizers import create_lorafa_optimizer

    config = peft_model.peft_config["default"]
    made: torch.optim.Optimizer = create_lorafa_optimizer(
        peft_model, r=config.r, lora_alpha=config.lora_alpha, lr=lr, weight_decay=weight_decay
    )
    return made


@adapter_init(
    "lora_fa",
    paper="arXiv:2308.03303",
    laws={"zero_product"},
    supplied={"rank"},
    frozen="A",
    shape_only=True,
    stock=True,
    optimizer=_projected_b,
)
def lora_fa(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Freeze A and train B alone, with the gradient that fits full fine-tuning best.

    .. math::
        \hat g_B = \tfrac{1}{s^2}\, g_B\, (A A^T)^{-1}

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), those of ``default``.

    Example:
        >>> lora_fa(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        An inverse of rank × rank for each module and step; no activations are kept for A.

    Deviates:
        The optimiser is PEFT's, AdamW on :math:`\hat g_B`; the first version of the paper trains B with its plain
        gradient.

    Reference:
        Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023,
        arXiv:2308.03303.
    """
    return default(weight, rank=rank, rng=rng)
