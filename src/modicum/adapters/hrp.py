r"""HRP, High-Rank Preheating: LoRA that starts in the directions that the task will need.

A LoRA whose B is zero can only learn in the row space of its A, which is drawn at random. HRP first trains a LoRA of
*higher* rank R for a few steps, decomposes what it learned, :math:`B A = U S V^T`, and starts the real LoRA, of rank r,
from the leading singular vectors. Base weights, scaling and file format stay those of plain LoRA.

The file holds the tensor functions; :mod:`modicum.adapters.preheat` does the same on a whole PEFT model.

What the published abstract and introduction say is the order of the stages and "the main singular vectors of the
preheated product"; which factor receives them, their length, R and the number of steps are our choice, and options.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge, Lt
from jaxtyping import Float
from torch import Tensor

from modicum.errors import ModicumError
from modicum.knobs import guarded
from modicum.linalg import SVD, product_svd
from modicum.random import generator as named
from modicum.registry import adapter_init
from modicum.types import Positive, PositiveInt

Factors: TypeAlias = tuple[Tensor, Tensor]  # lora_A (rank, in) and lora_B (out, rank)
Trained: TypeAlias = Literal["both", "A", "B"]
InitFactor: TypeAlias = Literal["A", "B", "auto", "balanced"]
Scale: TypeAlias = Literal["match", "unit"] | Positive
Tolerance: TypeAlias = Annotated[float, Ge(0), Lt(1)]
Deficient: TypeAlias = Literal["complete", "error"]
PreheatOptimizer: TypeAlias = Literal["same", "adamw", "sgd"]
Reuse: TypeAlias = Literal["restart", "continue"]
Redistribution: TypeAlias = Literal["none", "eva"]

# PEFT draws A from U(-1/sqrt(in), 1/sqrt(in)), so a row's squared length is 1/3 in expectation.
ROW_NORM = 1 / math.sqrt(3)
EXACT = 1e-8  # error of orthonormality above which the fast decomposition is not good enough


@guarded
@dataclass(frozen=True)
class Preheat:
    """Knobs of the preheating stage, which precede the tensor work.

    Args:
        preheat_rank: Rank R of the preheated adapter; ``None`` takes min(16 r, 256). Clipped to a module's short side.
        preheat_steps: Optimiser steps; ``None`` takes 2 % of the run, at least 10 and at most 50.
        preheat_lr: Learning rate; ``None`` takes the main run's.
        preheat_optimizer: ``same`` as the main run, where the caller hands it over, else AdamW.
        train_factors: ``both``, or one of the two with the other frozen at random values.
        keep_scaling: Preheat with the scaling of the main adapter. ``False`` keeps alpha, so that the scaling falls
            by r/R (or its square root) and the stage moves far less.
        reuse_data: ``restart`` shows the main run the preheating batches again, ``continue`` goes on after them.
        rank_redistribution: ``eva`` gives each module a rank by its share of the preheated spectrum, at the same sum.
    """

    preheat_rank: PositiveInt | None = None
    preheat_steps: PositiveInt | None = None
    preheat_lr: Positive | None = None
    preheat_optimizer: PreheatOptimizer = "same"
    train_factors: Trained = "both"
    keep_scaling: bool = True
    reuse_data: Reuse = "restart"
    rank_redistribution: Redistribution = "none"

    def rank_for(self, rank: int) -> int:
        """Return the preheating rank for an adapter of rank ``rank``.

        Example:
            >>> Preheat().rank_for(8)
            128
        """
        chosen = self.preheat_rank or max(rank, min(16 * rank, 256))
        if chosen < rank:
            raise ModicumError(f"preheat_rank is {chosen}, expected at least the adapter's rank {rank}. Raise it.")
        return chosen

    def steps_for(self, total: int | None) -> int:
        """Return the number of preheating steps for a run of ``total`` steps (``None``: unknown).

        Example:
            >>> Preheat().steps_for(1000), Preheat().steps_for(None)
            (20, 50)
        """
        if self.preheat_steps is not None:
            return self.preheat_steps
        return 50 if total is None else min(max(10, total // 50), 50)


def factor_svd(A: Float[Tensor, "*b R in"], B: Float[Tensor, "*b out R"], *, rank: int | None = None) -> SVD:
    """Decompose ``B @ A`` in float64 from its factors; each left vector's largest entry is positive.

    Args:
        A: Right factor, or a stack of them.
        B: Left factor, or a stack of them.
        rank: How many leading vectors of each side are wanted; ``None`` for all. All singular values are returned
            in either case. With a rank only R × R matrices are decomposed, which is about five times faster; those
            whose condition would tell are decomposed as without.

    Example:
        >>> factor_svd(torch.tensor([[0.0, 2.0]]), torch.tensor([[-3.0], [0.0]])).S
        tensor([6.], dtype=torch.float64)
    """
    A, B = A.double(), B.double()
    # Factors with more rank than their product can have: Gram matrices of R × R would hold nothing but rounding there.
    spare = A.shape[-2] > min(A.shape[-1], B.shape[-2])
    U, S, V = product_svd(B, A) if rank is None or spare else _leading(A, B, rank)
    top = U.gather(-2, U.abs().argmax(-2, keepdim=True))
    sign = torch.where(top < 0, -1.0, 1.0).to(U.dtype)
    return SVD(U * sign, S, V * sign)


def _leading(A: Tensor, B: Tensor, rank: int) -> SVD:
    """Take the leading vectors from the Gram matrices of both factors, which hold the squared singular values.

    Squaring costs half of the digits of what is far below the largest value. The vectors are therefore tested, and
    where they are not orthonormal to ``EXACT``, the slower way is taken.
    """
    L, failed = torch.linalg.cholesky_ex(A @ A.mT)
    L = torch.where(failed[..., None, None] == 0, L, 0.0)
    values, vectors = torch.linalg.eigh(L.mT @ (B.mT @ B) @ L)
    S, W = values.flip(-1).clamp_min(0).sqrt(), vectors[..., -rank:].flip(-1)
    U = B @ (L @ W / S[..., None, :rank].clamp_min(torch.finfo(S.dtype).tiny))
    V = (torch.linalg.solve_triangular(L.mT, W, upper=True).mT @ A).mT  # A.mT @ ... walks A against its rows
    identity = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    # What squaring lost shows in the lengths and angles of the vectors; NaN, of a missing direction, counts as wrong.
    lost = [(basis.mT @ basis - identity).abs().amax((-2, -1)) for basis in (U, V)]
    right = torch.maximum(*lost) <= EXACT
    if not right.all():
        U[~right], S[~right], V[~right] = (
            part[..., : whole.shape[-1]] for part, whole in zip(product_svd(B[~right], A[~right]), (U, S, V))
        )
    return SVD(U, S, V)


@adapter_init(
    "hrp",
    most_rank=min,
    paper="arXiv:2502.07739",
    laws={"zero_product", "orthogonal_rows"},
    supplied=("rank", "train_factors"),
    gather=Preheat,
    preheated={},
)
def hrp_factors(
    A: Float[Tensor, "R in"],
    B: Float[Tensor, "out R"],
    *,
    rank: PositiveInt,
    init_factor: InitFactor = "A",
    scale: Scale = "match",
    rtol: Tolerance = 1e-6,
    on_deficient: Deficient = "complete",
    train_factors: Trained = "both",
    generator: torch.Generator | None = None,
) -> Factors:
    r"""Start a LoRA from the leading singular vectors of a preheated one of higher rank.

    .. math::
        B A = U \operatorname{diag}(S) V^T, \qquad A_0 = c\, V_{1:r}^T,\; B_0 = 0

    or with ``init_factor="B"`` :math:`A_0 = 0,\; B_0 = c\, U_{1:r}`, or with ``"balanced"``
    :math:`A_0 = S_{1:r}^{1/2} V_{1:r}^T,\; B_0 = U_{1:r} S_{1:r}^{1/2}`, which keeps the best rank-r part of what was
    learned.

    Args:
        A: Preheated ``lora_A``.
        B: Preheated ``lora_B``.
        rank: Rank r of the adapter to start, at most R.
        init_factor: Which factor receives the vectors. ``auto`` is ``B`` when only B was trained, else ``A``.
        scale: Length c of each vector: ``match`` that of LoRA's usual A (:math:`1/\sqrt 3`), ``unit`` 1, or a number.
            ``balanced`` has its own.
        rtol: Singular values up to this share of the largest count as a missing direction.
        on_deficient: ``complete`` missing directions with random ones orthogonal to those found, or ``error``.
        train_factors: Which factors the preheating trained; decides ``auto``.
        generator: For the random directions; a fixed one when not given.

    Returns:
        ``lora_A`` (rank, in) and ``lora_B`` (out, rank), in the dtypes of A and B.

    Raises:
        ModicumError: Shapes do not fit, rank exceeds R, a factor is not finite, or the product is zero.

    Example:
        >>> A = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]])
        >>> lora_A, lora_B = hrp_factors(A, torch.eye(2), rank=1, scale="unit")
        >>> lora_A, lora_B
        (tensor([[0., 1., 0.]]), tensor([[0.],
                [0.]]))

    Cost:
        The Gram matrices of both factors and an eigendecomposition of R × R; where these would not be exact, two thin
        QR decompositions and an SVD of R × R. The product is never formed.

    Deviates:
        The published text that could be consulted names "the main singular vectors" of the product and "only a
        modification in the initial direction"; that they go to A with B = 0 and the length of A's usual rows is our
        reading. ``balanced`` is an extension and not HRP proper.

    Reference:
        Chen et al., "High-Rank Preheating" (HRP), 2025, arXiv:2502.07739, abstract and introduction.
    """
    _check_factors(A, B, rank)
    return factors_from_svd(
        factor_svd(A, B, rank=rank),
        rank=rank,
        init_factor=resolve_factor(init_factor, train_factors),
        scale=scale,
        rtol=rtol,
        on_deficient=on_deficient,
        rng=generator,
        dtypes=(A.dtype, B.dtype),
    )


def resolve_factor(init_factor: InitFactor, train_factors: Trained) -> Literal["A", "B", "balanced"]:
    """Return the factor that ``auto`` stands for, and warn where right vectors carry next to nothing."""
    if init_factor == "auto":
        return "B" if train_factors == "B" else "A"
    if init_factor == "A" and train_factors == "B":
        warnings.warn(
            "init_factor='A' after training only B: the right singular vectors stay within the random rows of the "
            "frozen A and say little about the task. Use init_factor='auto'.",
            stacklevel=4,
        )
    return init_factor


@guarded
def factors_from_svd(
    svd: SVD,
    *,
    rank: PositiveInt,
    init_factor: Literal["A", "B", "balanced"],
    scale: Scale = "match",
    rtol: Tolerance = 1e-6,
    on_deficient: Deficient = "complete",
    rng: torch.Generator | None = None,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
) -> Factors:
    """Make the factors from a decomposition that is known already; see :func:`hrp_factors`."""
    U, S, V = svd.U[:, :rank], svd.S[:rank], svd.V[:, :rank]
    length = _length(scale)
    found = int((rtol * S[0] < S).sum())
    if S[0] <= 0:
        raise ModicumError("The preheated product is zero: nothing was trained. Check which adapter is active.")
    if found < rank:
        if on_deficient == "error":
            raise ModicumError(
                f"The preheated product has {found} directions above rtol={rtol:g}, expected rank={rank}. "
                "Preheat longer, lower the rank, or set on_deficient to 'complete'."
            )
        rng = rng or named(0, "hrp", "complete")
        U = _complete(U[:, :found], rank, rng) if init_factor == "B" else U
        V = V if init_factor == "B" else _complete(V[:, :found], rank, rng)
    if init_factor == "A":
        A, B = length * V.mT, torch.zeros_like(U)
    elif init_factor == "B":
        A, B = torch.zeros_like(V.mT), length * U
    else:
        root = S.sqrt()
        root[found:] = 0
        # A direction that was not found starts as in plain LoRA; zero in both factors it could never move.
        A = torch.where(root > 0, root, length)[:, None] * V.mT
        B = U * root
    return A.contiguous().to(dtypes[0]), B.contiguous().to(dtypes[1])


def _check_factors(A: Tensor, B: Tensor, rank: int) -> None:
    if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
        raise ModicumError(f"A is {tuple(A.shape)} and B {tuple(B.shape)}, expected A (R, in) and B (out, R).")
    if rank > min(A.shape[0], A.shape[1], B.shape[0]):
        raise ModicumError(
            f"rank is {rank}, expected at most the preheated rank {A.shape[0]} and the module's short side "
            f"{min(A.shape[1], B.shape[0])}. Preheat at a higher rank or lower rank."
        )
    for name, factor in (("A", A), ("B", B)):
        if not torch.isfinite(factor).all():
            raise ModicumError(f"{name} holds NaN or infinite values: preheating diverged. Lower its learning rate.")


def _length(scale: Scale) -> float:
    if scale == "match":
        return ROW_NORM
    if scale == "unit":
        return 1.0
    return float(scale)


def _complete(basis: Tensor, rank: int, rng: torch.Generator) -> Tensor:
    """Append random orthonormal columns, orthogonal to those of ``basis``, up to ``rank``."""
    drawn = torch.randn(basis.shape[0], rank - basis.shape[1], generator=rng, device=rng.device, dtype=torch.float64)
    fresh = drawn.to(basis)
    for _ in range(2):  # once more removes what rounding left
        fresh = fresh - basis @ (basis.mT @ fresh)
        fresh = torch.linalg.qr(fresh).Q
    return torch.cat([basis, fresh], dim=1)
