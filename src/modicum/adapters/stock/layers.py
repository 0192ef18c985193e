r"""Baselines with another scaling, layer or base, all by fields of ``peft.LoraConfig``."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.drawn import default
from modicum.adapters.hrp import Factors
from modicum.errors import UnsupportedError
from modicum.registry import adapter_init
from modicum.types import PositiveInt


def _require_quantiser() -> None:
    if find_spec("bitsandbytes") is None or not torch.cuda.is_available():
        raise UnsupportedError(
            "loftq is PEFT's, which quantises with bitsandbytes on a CUDA device, and one of them is missing. Install "
            "and use them, or take hrp on a base that is quantised already."
        )


@adapter_init(
    "rslora",
    paper="arXiv:2312.03732",
    laws={"zero_product"},
    supplied={"rank"},
    shape_only=True,
    stock=True,
    config={"use_rslora": True},
)
def rslora(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Scale the product by alpha over the root of the rank, so that high ranks learn as fast as low ones.

    .. math::
        s = \alpha / \sqrt{r}

    The scaling is PEFT's ``use_rslora``.

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank r of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), those of ``default``.

    Example:
        >>> rslora(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        None.

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
    stock=True,
    config={"use_dora": True},
)
def dora(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Train a weight's row norms apart from its directions.

    .. math::
        W' = m \odot \frac{W + s B A}{\lVert W + s B A \rVert_{row}}

    The layer is PEFT's ``use_dora``, for whose gradient the norm is a constant, as section 4.3 of the paper proposes.

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), those of ``default``.

    Example:
        >>> dora(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        The norm of W + sBA at every step. Servers that read plain LoRA refuse it; merge it first.

    Reference:
        Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024, arXiv:2402.09353, equation 5.
    """
    return default(weight, rank=rank, rng=rng)


@adapter_init(
    "loftq",
    paper="arXiv:2310.08659",
    supplied={"rank"},
    shape_only=True,
    stock=True,
    requires=_require_quantiser,
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

    Example:
        >>> loftq(torch.zeros(3, 4), rank=2)[1].abs().sum()
        tensor(0.)

    Cost:
        A quantisation and a decomposition of each weight.

    Deviates:
        The start is PEFT's ``init_lora_weights="loftq"``, with one alternation between quantising and decomposing
        where the algorithm takes several; it needs bitsandbytes and a CUDA device. The adapter belongs to the
        quantised base, so its configuration goes on to say ``loftq``.

    Reference:
        Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024, arXiv:2310.08659.
    """
    return default(weight, rank=rank, rng=rng)
