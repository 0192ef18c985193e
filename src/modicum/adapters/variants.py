r"""Rivals that change something else than the start: the scaling, the layer, or the optimiser.

They start as plain LoRA does and exist here so that one name in a recipe chooses any of them. The facts ``config`` and
``optimizer`` say what the seam must do: fields of ``peft.LoraConfig``, and PEFT's own optimiser.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.hrp import Factors
from modicum.adapters.initializers import default
from modicum.registry import adapter_init
from modicum.types import PositiveInt


@adapter_init(
    "rslora",
    paper="arXiv:2312.03732",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    config={"use_rslora": True},
)
def rslora(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Scale the product by alpha over the root of the rank, so that high ranks learn as fast as low ones.

    .. math::
        s = \alpha / \sqrt{r}

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank r of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), those of ``default``.

    Raises:
        Nothing of its own.

    Example:
        >>> rslora(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        None.

    Deviates:
        None known; the scaling is PEFT's ``use_rslora``.

    Reference:
        Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023, arXiv:2312.03732.
    """
    return default(weight, rank=rank, rng=rng)


@adapter_init(
    "dora",
    paper="arXiv:2402.09353",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    config={"use_dora": True},
)
def dora(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Train a weight's row norms apart from its directions.

    .. math::
        W' = m \odot \frac{W + s B A}{\lVert W + s B A \rVert_{row}}

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), those of ``default``.

    Raises:
        Nothing of its own.

    Example:
        >>> dora(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        The norm of W + sBA at every step. Servers that read plain LoRA refuse it; merge it first.

    Deviates:
        None known; the layer is PEFT's ``use_dora``.

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, equation 5.
    """
    return default(weight, rank=rank, rng=rng)


@adapter_init(
    "loftq",
    paper="arXiv:2310.08659",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    config={"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
)
def loftq(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Quantise the base to 4 bits and start the adapter from what quantising lost; PEFT does both.

    .. math::
        \min_{Q, A, B} \lVert W - Q - B A \rVert_F

    Args:
        weight: Frozen weight; only its shape matters here.
        rank: Rank of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` and ``lora_B`` of ``default``: the values come from PEFT, which replaces the base too.

    Raises:
        Nothing of its own.

    Example:
        >>> loftq(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        A quantisation and a decomposition of each weight.

    Deviates:
        None known; the start is PEFT's ``init_lora_weights="loftq"``.

    Reference:
        Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024, arXiv:2310.08659.
    """
    return default(weight, rank=rank, rng=rng)


@adapter_init(
    "lora_plus",
    paper="arXiv:2402.12354",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    optimizer="lora_plus",
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

    Raises:
        Nothing of its own.

    Example:
        >>> lora_plus(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        None.

    Deviates:
        None known; the optimiser is PEFT's.

    Reference:
        Hayou, Ghosh, Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024, arXiv:2402.12354.
    """
    del ratio  # read by the optimiser
    return default(weight, rank=rank, rng=rng)


@adapter_init(
    "lora_fa",
    paper="arXiv:2308.03303",
    laws={"zero_product"},
    supplied={"rank"},
    frozen=("A",),
    shape_only=True,
    optimizer="lora_fa",
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

    Raises:
        Nothing of its own.

    Example:
        >>> lora_fa(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        An inverse of rank × rank for each module and step; no activations are kept for A.

    Deviates:
        None known; the optimiser is PEFT's.

    Reference:
        Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023,
        arXiv:2308.03303.
    """
    return default(weight, rank=rank, rng=rng)
