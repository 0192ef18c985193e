r"""Baselines that know only the shape of a weight: A is drawn, and the product is zero.

Each returns ``(lora_A, lora_B)`` in float32.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.hrp import Factors
from modicum.errors import UnsupportedError
from modicum.random import generator
from modicum.registry import adapter_init
from modicum.types import PositiveInt


@adapter_init("default", paper="arXiv:2106.09685", laws={"zero_product"}, supplied={"rank"}, shape_only=True)
def default(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Draw A uniformly and leave B at zero, as LoRA does.

    .. math::
        A_{ij} \sim U(-1/\sqrt{n}, 1/\sqrt{n}), \qquad B = 0

    Args:
        weight: Frozen weight; only its shape (out, in = n) matters.
        rank: Rank of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Example:
        >>> A, B = default(torch.zeros(3, 4), rank=2)
        >>> A.shape, bool((A.abs() <= 0.5).all()), float(B.abs().sum())
        (torch.Size([2, 4]), True, 0.0)

    Cost:
        One draw.

    Deviates:
        PEFT draws from the global generator; this from a named one.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685, section 4.1.
    """
    out, width = weight.shape
    A = (2 * torch.rand(rank, width, generator=_rng(rng)) - 1) / math.sqrt(width)
    return A, torch.zeros(out, rank)


@adapter_init("gaussian", paper="arXiv:2106.09685", laws={"zero_product"}, supplied={"rank"}, shape_only=True)
def gaussian(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Draw A from a normal distribution of deviation 1/r and leave B at zero.

    .. math::
        A_{ij} \sim N(0, 1/r^2), \qquad B = 0

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank r of the adapter.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Example:
        >>> A, B = gaussian(torch.zeros(3, 4), rank=2)
        >>> A.shape, float(B.abs().sum())
        (torch.Size([2, 4]), 0.0)

    Cost:
        One draw.

    Deviates:
        PEFT draws from the global generator; this from a named one.

    Reference:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685; the deviation
        1/r is that of Hugging Face PEFT.
    """
    out, width = weight.shape
    return torch.randn(rank, width, generator=_rng(rng)) / rank, torch.zeros(out, rank)


@adapter_init("orthogonal", laws={"zero_product"}, supplied={"rank"}, shape_only=True)
def orthogonal(weight: Float[Tensor, "out in"], *, rank: PositiveInt, rng: torch.Generator | None = None) -> Factors:
    r"""Start both factors from zero-product halves of one random orthogonal matrix, so that neither is zero.

    .. math::
        A = (G_1 Q_{odd})^T / 10, \qquad B = G_2 Q_{even} / 10, \qquad B A = 0

    with :math:`Q_{odd}, Q_{even}` alternate rows of an orthogonal r × r matrix and :math:`G` Gaussian.

    Args:
        weight: Frozen weight; only its shape matters.
        rank: Rank r of the adapter; even.
        rng: Source of the draw.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank is odd.

    Example:
        >>> A, B = orthogonal(torch.zeros(3, 4), rank=2)
        >>> bool((B @ A).abs().max() < 1e-6), bool(B.abs().sum() > 0)
        (True, True)

    Cost:
        Three draws and a QR decomposition of r × r.

    Deviates:
        PEFT draws from the global generator; this from a named one.

    Reference:
        Datta, "Rethinking LoRA initialisation", blog post, 2024; formula as in Hugging Face PEFT.
    """
    if rank % 2:
        raise UnsupportedError(f"orthogonal needs an even rank, got {rank}. Use {rank + 1} or {rank - 1 or 2}.")
    out, width = weight.shape
    rng = _rng(rng)
    Q = torch.linalg.qr(torch.randn(rank, rank, generator=rng)).Q
    A = (torch.randn(width, rank // 2, generator=rng) @ Q[0::2]).T / 10
    B = torch.randn(out, rank // 2, generator=rng) @ Q[1::2] / 10
    return A.contiguous(), B


@adapter_init(
    "etf",
    laws={"zero_product", "orthogonal_rows"},
    supplied={"rank"},
    shape_only=True,
    most_rank=lambda _outputs, inputs: inputs,
)
def etf(
    weight: Float[Tensor, "out in"], *, rank: PositiveInt, rounds: PositiveInt = 50, rng: torch.Generator | None = None
) -> Factors:
    r"""Start A as an equal-norm tight frame, the best-spread start that knows nothing of the task; B is zero.

    .. math::
        A A^T = \tfrac{r}{3}\,\tfrac{1}{r} I, \qquad \lVert a_{:j} \rVert \text{ equal for all columns } j, \qquad B = 0

    found by alternating between the nearest tight frame (the polar factor) and equal column norms.

    Args:
        weight: Frozen weight; only its shape (out, in) matters.
        rank: Rank r of the adapter, at most the number of inputs.
        rounds: Alternations; the column norms agree to about 1e-6 after 50.
        rng: Source of the random start.

    Returns:
        ``lora_A`` (rank, in) with LoRA's usual row length, and ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank exceeds the number of inputs.

    Example:
        >>> A, _ = etf(torch.zeros(3, 8), rank=2)
        >>> torch.allclose(3 * A @ A.T, torch.eye(2), atol=1e-5)
        True

    Cost:
        ``rounds`` Gram matrices of r × r.

    Deviates:
        Equiangular tight frames exist for few sizes; this gives equal norms and tightness, and angles as they come.

    Reference:
        Equiangular start for LoRA's A: "Towards Understanding the Dynamics of LoRA", ICML 2026. Alternation: Tropp et
        al., "Designing structured tight frames via an alternating projection method", IEEE Trans. Inf. Theory, 2005.
    """
    out, width = weight.shape
    if rank > width:
        raise UnsupportedError(f"etf needs a rank of at most the {width} inputs, got {rank}. Lower the rank.")
    frame = torch.randn(rank, width, generator=_rng(rng), dtype=torch.float64)
    for _ in range(rounds):
        frame = frame / frame.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
        values, vectors = torch.linalg.eigh(frame @ frame.T)
        frame = (vectors * values.rsqrt()) @ vectors.T @ frame
    return (frame / math.sqrt(3)).float(), torch.zeros(out, rank)


def _rng(rng: torch.Generator | None) -> torch.Generator:
    return rng or generator(0, "adapter")
