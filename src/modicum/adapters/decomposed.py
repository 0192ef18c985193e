r"""Baselines that decompose the frozen weight: its principal part, its least part, or a frame of its directions.

Each returns ``(lora_A, lora_B)`` in float32; :math:`s` is the adapter's scaling, so the layer computes
:math:`W x + s B A x`. Those marked ``shifts_base`` start with a product that is not zero and expect the caller to
subtract :math:`s B A` from the weight, so that the model starts unchanged; their adapter then belongs to that shifted
base until it is converted (:func:`modicum.adapters.serving.without_shift`).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.hrp import Factors
from modicum.errors import UnsupportedError
from modicum.linalg import SVD, truncated_svd
from modicum.random import generator
from modicum.registry import adapter_init
from modicum.types import Positive, PositiveInt


@adapter_init(
    "pissa", paper="arXiv:2404.02948", laws={"best_rank"}, supplied={"rank", "scaling"}, shifts_base=True, most_rank=min
)
def pissa(
    weight: Float[Tensor, "out in"],
    *,
    rank: PositiveInt,
    scaling: Positive = 1.0,
    fast: bool = False,
    rng: torch.Generator | None = None,
) -> Factors:
    r"""Train the weight's principal part: its leading singular triplets, which leave the base.

    .. math::
        W = U S V^T, \qquad A = (S_{1:r}/s)^{1/2} V_{1:r}^T, \qquad B = U_{1:r} (S_{1:r}/s)^{1/2}

    Args:
        weight: Frozen weight (out, in).
        rank: Rank r of the adapter.
        scaling: Scaling s of the adapter.
        fast: Randomised subspace iteration instead of an exact decomposition.
        rng: For ``fast``.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank exceeds the weight's short side.

    Example:
        >>> A, B = pissa(torch.diag(torch.tensor([4.0, 1.0])), rank=1)
        >>> B @ A
        tensor([[4., 0.],
                [0., 0.]])

    Cost:
        A singular value decomposition of the weight.

    Deviates:
        The paper's scaling is 1; another is divided out, so that base and adapter still add up to the weight. The
        decomposition is exact unless ``fast`` is set.

    Reference:
        Meng, Wang, Zhang, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models",
        NeurIPS 2024, arXiv:2404.02948, equations 2-4.
    """
    _check_rank("pissa", weight, rank)
    rng = rng or generator(0, "adapter")
    svd = truncated_svd(weight.float(), rank, solver="randomized" if fast else "gram", rng=rng)
    return _split(svd, scaling)


@adapter_init("milora", paper="arXiv:2406.09044", supplied={"rank", "scaling"}, shifts_base=True, most_rank=min)
def milora(weight: Float[Tensor, "out in"], *, rank: PositiveInt, scaling: Positive = 1.0) -> Factors:
    r"""Train the weight's least important part: its last singular triplets, which leave the base.

    .. math::
        A = (S_{-r:}/s)^{1/2} V_{-r:}^T, \qquad B = U_{-r:} (S_{-r:}/s)^{1/2}

    Args:
        weight: Frozen weight (out, in).
        rank: Rank r of the adapter.
        scaling: Scaling s of the adapter.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank exceeds the weight's short side.

    Example:
        >>> A, B = milora(torch.diag(torch.tensor([4.0, 1.0])), rank=1)
        >>> B @ A
        tensor([[0., 0.],
                [0., 1.]])

    Cost:
        A full singular value decomposition of the weight.

    Deviates:
        The paper's scaling is 1; another is divided out, so that base and adapter still add up to the weight.

    Reference:
        Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", NAACL 2025,
        arXiv:2406.09044, section 3.
    """
    _check_rank("milora", weight, rank)
    return _split(_last(weight, rank), scaling)


@adapter_init("olora", paper="arXiv:2406.01775", supplied={"rank"}, shifts_base=True, most_rank=min)
def olora(weight: Float[Tensor, "out in"], *, rank: PositiveInt) -> Factors:
    r"""Start from the first columns and rows of the weight's QR decomposition, which leave the base.

    .. math::
        W = Q R, \qquad A = R_{1:r}, \qquad B = Q_{:, 1:r}

    Args:
        weight: Frozen weight (out, in).
        rank: Rank r of the adapter.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank exceeds the weight's short side.

    Example:
        >>> A, B = olora(torch.eye(3), rank=2)
        >>> torch.allclose((B @ A).abs(), torch.diag(torch.tensor([1.0, 1.0, 0.0])))
        True

    Cost:
        A QR decomposition of the weight.

    Deviates:
        The product leaves the base times PEFT's alpha / r, which the paper's layer does not have.

    Reference:
        Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, arXiv:2406.01775.
    """
    _check_rank("olora", weight, rank)
    Q, R = torch.linalg.qr(weight.double())
    return R[:rank].float().contiguous(), Q[:, :rank].float().contiguous()


@adapter_init("mica", paper="arXiv:2604.01694", laws={"zero_product"}, supplied={"rank"}, frozen="B", most_rank=min)
def mica(weight: Float[Tensor, "out in"], *, rank: PositiveInt) -> Factors:
    r"""Let the weight's least used output directions learn: B holds them and stays frozen, A starts at zero.

    .. math::
        A = 0, \qquad B = U_{-r:}

    Args:
        weight: Frozen weight (out, in).
        rank: Rank r of the adapter.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank exceeds the weight's short side.

    Example:
        >>> A, B = mica(torch.diag(torch.tensor([4.0, 1.0])), rank=1)
        >>> A.abs().sum(), B.abs()
        (tensor(0.), tensor([[0.],
                [1.]]))

    Cost:
        A full singular value decomposition of the weight.

    Reference:
        "MiCA: Minor Component Adaptation", 2026, arXiv:2604.01694; formula as in Hugging Face PEFT.
    """
    _check_rank("mica", weight, rank)
    return torch.zeros(rank, weight.shape[1]), _last(weight, rank).U.contiguous()


@adapter_init("lora_xs", paper="arXiv:2405.17604", laws={"zero_product"}, supplied={"rank"}, core=True, most_rank=min)
def lora_xs(weight: Float[Tensor, "out in"], *, rank: PositiveInt) -> Factors:
    r"""Freeze the weight's principal directions and train only a small matrix between them.

    .. math::
        \Delta W = s\, U_{1:r} S_{1:r}\, R\, V_{1:r}^T, \qquad R_0 = 0

    The first factor is returned as ``lora_B``; :func:`modicum.adapters.core.train_core` makes R its trained part.

    Args:
        weight: Frozen weight (out, in).
        rank: Rank r of the adapter, whose trained part has r² entries.

    Returns:
        ``lora_A`` (rank, in) and the frame of ``lora_B`` (out, rank).

    Raises:
        UnsupportedError: The rank exceeds the weight's short side.

    Example:
        >>> A, frame = lora_xs(torch.diag(torch.tensor([4.0, 1.0])), rank=1)
        >>> A.abs(), frame.abs()
        (tensor([[1., 0.]]), tensor([[4.],
                [0.]]))

    Cost:
        A singular value decomposition of the weight.

    Deviates:
        R starts at zero, so that the model starts unchanged; the authors draw it with deviation 1e-5.

    Reference:
        Bałazy et al., "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", 2024,
        arXiv:2405.17604, equation 2.
    """
    _check_rank("lora_xs", weight, rank)
    U, S, V = truncated_svd(weight.float(), rank)
    return V.T.contiguous(), (U * S).contiguous()


def _last(weight: Tensor, rank: int) -> SVD:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return SVD(U[:, -rank:].float(), S[-rank:].float(), Vh[-rank:].T.float())


def _split(svd: SVD, scaling: float) -> Factors:
    """Share the singular values out evenly, so that ``scaling * B @ A`` is the decomposed matrix."""
    root = (svd.S / scaling).sqrt()
    return (root[:, None] * svd.V.T).contiguous(), svd.U * root


def _check_rank(name: str, weight: Tensor, rank: int) -> None:
    if rank > min(weight.shape):
        raise UnsupportedError(
            f"{name} takes rank directions of a weight of shape {tuple(weight.shape)}, got rank {rank}. "
            f"Lower it to {min(weight.shape)} or exclude the module."
        )
