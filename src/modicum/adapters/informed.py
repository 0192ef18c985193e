r"""Initialisations from the task's data: the loss' gradient at the frozen weight, or the inputs that a layer sees.

The gradient G is :math:`\partial L / \partial W` (out, in), averaged over batches. The second moment C is
:math:`E[x x^T]` (in, in) over the tokens that are not padding. :mod:`modicum.adapters.calibrate` collects both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from modicum.adapters.hrp import Factors
from modicum.errors import ModicumError
from modicum.linalg import SVD, truncated_svd
from modicum.registry import adapter_init
from modicum.types import Positive, PositiveInt


@dataclass(frozen=True)
class Calibration:
    """Knobs of collecting gradients or inputs.

    Args:
        batches: Micro-batches of the training data to average over, on each process.
    """

    batches: PositiveInt = 8


@dataclass(frozen=True)
class InputCalibration(Calibration):
    """Knobs of looking at inputs.

    Args:
        batches: Micro-batches of the training data to average over, on each process.
        rank_redistribution: ``eva`` gives each module a rank by the variance that its directions explain, at the same
            sum.
        rho: Highest rank of a module, as a multiple of the adapter's.
    """

    rank_redistribution: Literal["none", "eva"] = "none"
    rho: Annotated[float, Ge(1)] = 2.0


Direction = Literal["ArB2r", "A2rBr", "ArBr"]


@adapter_init(
    "lora_ga",
    paper="arXiv:2407.05000",
    supplied={"rank"},
    gather=Calibration,
    shifts_base=True,
    most_rank=lambda outputs, inputs: min(outputs, inputs) // 2,
)
def lora_ga(
    gradient: Float[Tensor, "out in"],
    *,
    rank: PositiveInt,
    direction: Direction = "ArB2r",
    scale: Literal["stable", "unit"] = "stable",
    convention: Literal["peft", "authors"] = "peft",
    gamma: Positive = 16.0,
) -> Factors:
    r"""Align the first step of LoRA with that of full fine-tuning: factors from the gradient's singular vectors.

    .. math::
        G = U S V^T, \qquad A = V_{1:r}^T, \qquad B = c\, U_{r+1:2r} S_{r+1:2r}, \qquad
        c = m^{1/4} \gamma^{-1/2}

    with m outputs, in the convention of PEFT. The authors' own code leaves S out and multiplies both factors by c.

    Args:
        gradient: Average gradient G (out, in).
        rank: Rank r of the adapter; 2 r directions are needed.
        direction: Which directions each factor takes: ``ArB2r`` A the first r and B the next, ``A2rBr`` the other way,
            ``ArBr`` alternately (B the even, A the odd).
        scale: ``stable`` as above, or ``unit`` for c = 1.
        convention: ``peft`` or ``authors``; the two published scalings differ.
        gamma: The constant of ``stable``.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        ModicumError: The gradient has fewer than 2 r directions, is zero or not finite.

    Example:
        >>> A, B = lora_ga(torch.diag(torch.tensor([2.0, 1.0])), rank=1, scale="unit")
        >>> A.abs(), B.abs()
        (tensor([[1., 0.]]), tensor([[0.],
                [1.]]))

    Cost:
        A truncated decomposition of the gradient.

    Deviates:
        The decomposition is exact where both codes take a randomised one.

    Reference:
        Wang, Yu, Li, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", NeurIPS 2024, arXiv:2407.05000,
        theorem 3.1 and section 3.3.
    """
    U, S, V = _leading(gradient, 2 * rank, "lora_ga")
    first, second = slice(0, rank), slice(rank, 2 * rank)
    for_A, for_B = {
        "ArB2r": (first, second),
        "A2rBr": (second, first),
        "ArBr": (slice(1, 2 * rank, 2), slice(0, 2 * rank, 2)),
    }[direction]
    factor = gradient.shape[0] ** 0.25 / gamma**0.5 if scale == "stable" else 1.0
    if convention == "authors":
        return (factor * V[:, for_A].T).contiguous(), factor * U[:, for_B]
    return V[:, for_A].T.contiguous(), factor * U[:, for_B] * S[for_B]


@adapter_init("lora_one", paper="arXiv:2502.01235", supplied={"rank"}, gather=Calibration, most_rank=min)
def lora_one(gradient: Float[Tensor, "out in"], *, rank: PositiveInt, gamma: Positive = 128.0) -> Factors:
    r"""Start one step of gradient descent ahead, along the leading directions of the negative gradient.

    .. math::
        -G = U S V^T, \qquad A = \gamma^{-1/2} (S_{1:r}/S_1)^{1/2} V_{1:r}^T, \qquad
        B = \gamma^{-1/2} U_{1:r} (S_{1:r}/S_1)^{1/2}

    The base stays as it is: the product is the step.

    Args:
        gradient: Average gradient G (out, in).
        rank: Rank r of the adapter.
        gamma: Length of the step is 1/gamma; the authors use 128 with rsLoRA scaling and alpha 16.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        ModicumError: The gradient has fewer than r directions, is zero or not finite.

    Example:
        >>> A, B = lora_one(torch.diag(torch.tensor([2.0, 1.0])), rank=1, gamma=4.0)
        >>> (B @ A)[0, 0]
        tensor(-0.2500)

    Cost:
        A truncated decomposition of the gradient.

    Deviates:
        The authors go on with preconditioned gradients; here the run's own optimiser takes the steps.

    Reference:
        Zhang, Liu, Chen, "LoRA-One: One-Step Full Gradient Could Suffice for Fine-Tuning Large Language Models,
        Provably and Efficiently", ICML 2025, arXiv:2502.01235, algorithm 1.
    """
    U, S, V = _leading(-gradient, rank, "lora_one")
    root = (S / S[0] / gamma).sqrt()
    return (root[:, None] * V.T).contiguous(), U * root


@adapter_init("lora_sb", paper="arXiv:2411.19557", supplied={"rank"}, gather=Calibration, core=True, most_rank=min)
def lora_sb(gradient: Float[Tensor, "out in"], *, rank: PositiveInt) -> Factors:
    r"""Freeze the gradient's leading directions and train only a small matrix between them.

    .. math::
        -G = U S V^T, \qquad \Delta W = s\, U_{1:r}\, R\, V_{1:r}^T, \qquad R_0 = 0

    The first factor is returned as ``lora_B``; :func:`modicum.adapters.core.train_core` makes R its trained part.

    Args:
        gradient: Average gradient G (out, in).
        rank: Rank r of the adapter, whose trained part has r² entries.

    Returns:
        ``lora_A`` (rank, in) and the frame of ``lora_B`` (out, rank).

    Raises:
        ModicumError: The gradient has fewer than r directions, is zero or not finite.

    Example:
        >>> A, frame = lora_sb(torch.diag(torch.tensor([2.0, 1.0])), rank=1)
        >>> A.abs(), frame.abs()
        (tensor([[1., 0.]]), tensor([[1.],
                [0.]]))

    Cost:
        A truncated decomposition of the gradient.

    Deviates:
        R starts at zero instead of at the first step's length :math:`\eta S_{1:r}/s`, so the model starts unchanged.

    Reference:
        Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient Low-Rank
        Fine-Tuning", 2024, arXiv:2411.19557, section 3.
    """
    U, _, V = _leading(-gradient, rank, "lora_sb")
    return V.T.contiguous(), U.contiguous()


@adapter_init(
    "eva",
    most_rank=lambda _outputs, inputs: inputs,
    paper="arXiv:2410.07170",
    laws={"zero_product", "orthogonal_rows"},
    supplied={"rank"},
    gather=InputCalibration,
    shape_only=True,
)
def eva(moment: Float[Tensor, "in in"], weight: Float[Tensor, "out in"], *, rank: PositiveInt) -> Factors:
    r"""Start A in the directions that explain most of the layer's inputs; B is zero.

    .. math::
        C = E[x x^T] = V \Lambda V^T, \qquad A = V_{1:r}^T, \qquad B = 0

    Args:
        moment: Second moment C of the layer's inputs (in, in).
        weight: Frozen weight; only its shape matters.
        rank: Rank r of the adapter.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        ModicumError: The moment is not finite, or has fewer than r directions.

    Example:
        >>> A, B = eva(torch.diag(torch.tensor([1.0, 9.0])), torch.zeros(3, 2), rank=1)
        >>> A.abs(), B.shape
        (tensor([[0., 1.]]), torch.Size([3, 1]))

    Cost:
        An eigendecomposition of in × in; the moment needs in² numbers for each module.

    Deviates:
        The inputs' second moment is exact and not centred; PEFT runs an incremental, centred decomposition until the
        directions settle. Ranks stay uniform unless ``rank_redistribution`` says otherwise, as EVA's do.

    Reference:
        Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation", 2024,
        arXiv:2410.07170, section 3.
    """
    _, _, V = _leading(moment, rank, "eva")
    return V.T.contiguous(), torch.zeros(weight.shape[0], rank)


@adapter_init(
    "corda", paper="arXiv:2406.05223", supplied={"rank", "scaling"}, gather=Calibration, shifts_base=True, most_rank=min
)
def corda(
    weight: Float[Tensor, "out in"],
    moment: Float[Tensor, "in in"],
    *,
    rank: PositiveInt,
    scaling: Positive = 1.0,
    mode: Literal["ipm", "kpm"] = "ipm",
    damping: Positive = 0.01,
) -> Factors:
    r"""Decompose the weight as the task's inputs see it, and train its leading (or last) part, which leaves the base.

    .. math::
        W C = U S V^T, \qquad A = (S/s)^{1/2} V^T C^{-1}, \qquad B = U (S/s)^{1/2}

    over the first r triplets (``ipm``) or the last (``kpm``, which keeps what C describes).

    Args:
        weight: Frozen weight W (out, in).
        moment: Second moment of the layer's inputs; :math:`C` is it plus the damping.
        rank: Rank r of the adapter.
        scaling: Scaling s of the adapter.
        mode: Which triplets.
        damping: Share of C's mean diagonal added to its diagonal; doubled until C times its inverse is the identity to
            0.05.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank).

    Raises:
        ModicumError: The moment is zero or not finite, or the rank exceeds the weight's short side.

    Example:
        >>> A, B = corda(torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([9.0, 1.0])), rank=1)
        >>> B @ A
        tensor([[1., 0.],
                [0., 0.]])

    Cost:
        An inverse of in × in and a decomposition of out × in, in float64.

    Deviates:
        The paper's scaling is 1; another is divided out, so that base and adapter still add up to the weight.
        The moment averages the tokens that are not padding as they are; PEFT divides each sample by its largest entry.

    Reference:
        Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
        Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv:2406.05223, equations 2-5.
    """
    if rank > min(weight.shape):
        raise ModicumError(f"corda takes rank directions of a weight {tuple(weight.shape)}, got rank {rank}. Lower it.")
    C, inverse = _invertible(moment.double(), damping)
    U, S, Vh = torch.linalg.svd(weight.double() @ C, full_matrices=False)
    part = slice(0, rank) if mode == "ipm" else slice(-rank, None)
    root = (S[part] / scaling).sqrt()
    return (root[:, None] * Vh[part] @ inverse).float(), (U[:, part] * root).float()


def _invertible(C: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    identity = torch.eye(len(C), dtype=C.dtype, device=C.device)
    mean = C.diagonal().mean()
    if not mean > 0 or not torch.isfinite(C).all():
        raise ModicumError("The inputs' second moment is zero or not finite. Check the calibration batches.")
    for doubling in range(40):
        damped = C + damping * 2**doubling * mean * identity
        inverse, failed = torch.linalg.inv_ex(damped)
        if not failed and torch.dist(damped @ inverse, identity) < 0.05:
            return damped, inverse
    raise ModicumError(f"corda cannot invert the inputs' second moment with damping {damping:g}. Use 0.01 or more.")


def _leading(matrix: Tensor, count: int, name: str) -> SVD:
    if count > min(matrix.shape):
        raise ModicumError(
            f"{name} needs {count} directions, a matrix of shape {tuple(matrix.shape)} has {min(matrix.shape)}. "
            "Lower the rank or exclude the module."
        )
    if not torch.isfinite(matrix).all() or not matrix.any():
        raise ModicumError(f"{name}: the gradient or moment is zero or not finite. Check the calibration batches.")
    return truncated_svd(matrix.float(), count)
