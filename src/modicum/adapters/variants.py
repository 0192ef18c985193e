r"""Rivals that change something else than the start: the scaling, the layer, or the optimiser.

They start as plain LoRA does and exist here so that one name in a recipe chooses any of them. The facts ``config``,
``optimizer`` and ``adaptive`` say what the seam must do: fields of ``peft.LoraConfig``, PEFT's own optimiser, PEFT's
adapter that loses rank while it trains.

Full fine-tuning, the rival from above, is a recipe without ``adapter``.
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
from modicum.types import NonNegative, PositiveInt, UnitInterval


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
        None known; the start is PEFT's ``init_lora_weights="loftq"``, which needs bitsandbytes and a CUDA device. It is
        the one method whose adapter belongs to another base, the quantised one, so its configuration goes on to say so.

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


@adapter_init(
    "adalora",
    paper="arXiv:2303.10512",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    adaptive=True,
)
def adalora(
    weight: Float[Tensor, "out in"],
    *,
    rank: PositiveInt,
    spare: Annotated[float, Ge(1)] = 1.5,
    warmup: UnitInterval = 0.1,
    settled: UnitInterval = 0.3,
    interval: PositiveInt = 1,
    orthogonality: NonNegative = 0.5,
    rng: torch.Generator | None = None,
) -> Factors:
    r"""Train in the form of a singular value decomposition, and drop the triplets that matter least, over all modules.

    .. math::
        \Delta W = s\, P \Lambda Q, \qquad L' = L + \gamma\, (\lVert P^T P - I \rVert_F + \lVert Q Q^T - I \rVert_F)

    with the norms averaged over the modules. The budget falls from ``spare`` times the rank to the rank as a cubic
    between the warm-up and the settled end of the run. What is saved is plain LoRA of the largest rank that a module
    kept.

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Mean rank of a module in the end.
        spare: Ranks to begin with, as a multiple of it.
        warmup: Share of the run before the budget falls.
        settled: Share of the run after it has fallen.
        interval: Optimiser steps between two looks at the budget.
        orthogonality: Weight gamma of the penalty.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank) of ``default``: P, Q and the zero singular values are PEFT's.

    Raises:
        Nothing of its own.

    Example:
        >>> adalora(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        Three running averages of each adapter weight, and a Gram matrix of each factor at every step.

    Deviates:
        The layer and the allocation are PEFT's, whose defaults for the schedule are no warm-up and no settled end; the
        shares here are ours. The scaling stays alpha over ``rank``, where PEFT divides by the first rank.

    Reference:
        Zhang et al., "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning" (AdaLoRA), ICLR 2023,
        arXiv:2303.10512, equations 3-6 and algorithm 1.
    """
    del spare, warmup, settled, interval, orthogonality  # read by the seam
    return default(weight, rank=rank, rng=rng)
