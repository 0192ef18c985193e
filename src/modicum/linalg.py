"""Decompositions: truncated singular value decompositions and the polar factor of a stack of singular vectors.

Letters: ``m n`` sides of a matrix, ``k`` a rank. Everything here is float64 or float32 as it comes; callers choose.
"""

from __future__ import annotations

import warnings
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

CLEAR = 0.05  # singular values from this share of the largest on come out of a float32 Gram matrix to about 2e-5
SINGLE = 1e-2  # with a cut-off this high a stack is whitened in float32: an error of 1e-7 / 1e-2 at worst
DEPENDENT = 1e-5  # smallest singular value of a stack of unit columns, relative to the largest, that is not noise
Solver: TypeAlias = Literal["gram", "randomized", "svd"]


class SVD(NamedTuple):
    """The ``k`` largest singular values with their vectors: ``U (m, k)``, ``S (k,)``, ``V (n, k)``."""

    U: Tensor
    S: Tensor
    V: Tensor


def truncated_svd(
    matrix: Float[Tensor, "m n"], rank: int, *, solver: Solver = "gram", rng: torch.Generator | None = None
) -> SVD:
    """Return the ``rank`` largest singular triplets.

    Args:
        matrix: What to decompose.
        rank: How many; at least 1 and at most the short side.
        solver: ``gram`` takes the eigenvectors of the short side's Gram matrix in float64, which is many times faster
            than ``svd`` and as exact for singular values above about 1e-7 of the largest; ``randomized`` is for ranks
            far below the short side.
        rng: For ``randomized``; a fixed one when not given.

    Example:
        >>> truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2).S
        tensor([3., 2.])
    """
    if solver == "svd":
        U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return SVD(U[:, :rank], S[:rank], Vh[:rank].T)
    if solver == "randomized":
        return _randomized(matrix, rank, rng)
    return SVD(*(part.to(matrix.dtype) for part in _gram(matrix.double(), rank)))


def mixed_svd(matrix: Float[Tensor, "m n"], rank: int) -> SVD:
    r"""Return the ``rank`` largest singular triplets: in float32 where that is as good, in float64 where it is not.

    A Gram matrix squares the spread of the singular values, so the direction of :math:`\sigma_i` is off by about
    :math:`\epsilon\, (\sigma_1 / \sigma_i)^2`. The smallest triplet that is asked for therefore tells whether float32
    was enough: at a twentieth of the largest it is off by 2e-5, below that the decomposition is repeated in float64.

    Args:
        matrix: What to decompose, in float32.
        rank: How many; at least 1 and at most the short side.

    Example:
        >>> mixed_svd(torch.diag(torch.tensor([3.0, 2.0, 0.01])), 2).S.dtype
        torch.float32
        >>> mixed_svd(torch.diag(torch.tensor([3.0, 2.0, 0.01])), 3).S.dtype
        torch.float64
    """
    part = _gram(matrix, rank)
    return part if float(part.S[-1]) >= CLEAR * float(part.S[0]) else _gram(matrix.double(), rank)


def _gram(matrix: Tensor, rank: int) -> SVD:
    """Decompose a matrix through the Gram matrix of its short side, in its own precision."""
    if matrix.shape[0] > matrix.shape[1]:
        U, S, V = _gram(matrix.T, rank)
        return SVD(V, S, U)
    _, vectors = torch.linalg.eigh(_upper_gram(matrix), UPLO="U")
    U = vectors[:, -rank:].flip(1)
    V = matrix.T @ U
    S = V.norm(dim=0)
    # Columns of zero length belong to the null space: they stay zero, and contribute nothing.
    return SVD(U, S, V / S.clamp_min(torch.finfo(S.dtype).tiny))


def _upper_gram(rows: Tensor, *, blocks: int = 4) -> Tensor:
    """Return the inner products of all rows, right on and above the diagonal: five eighths of the work."""
    gram = rows.new_zeros(len(rows), len(rows))
    step = max(1, -(-len(rows) // blocks))
    for start in range(0, len(rows), step):
        gram[start : start + step, start:] = rows[start : start + step] @ rows[start:].T
    return gram


def _randomized(matrix: Tensor, rank: int, rng: torch.Generator | None, *, extra: int = 64, rounds: int = 2) -> SVD:
    """Subspace iteration from a random start, orthonormalised at each half step."""
    m, n = matrix.shape
    size = min(rank + extra, m, n)
    rng = rng or torch.Generator().manual_seed(0)
    start = torch.randn(n, size, generator=rng, dtype=torch.float32).to(matrix)
    Q = torch.linalg.qr(matrix @ start).Q
    for _ in range(rounds):
        Q = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ matrix, full_matrices=False)
    return SVD(Q @ U[:, :rank], S[:rank], Vh[:rank].T)


def inverse_root(gram: Float[Tensor, "k k"], *, rtol: float) -> tuple[Float[Tensor, "k k"], Float[Tensor, " k"]]:
    """Return the pseudo-inverse square root of a positive semi-definite matrix, and its eigenvalues.

    Args:
        gram: The matrix; its upper triangle is read.
        rtol: Eigenvalues below this share of the largest are dropped. At 0 only those that are not positive are
            replaced by the smallest positive number, so nothing is dropped.
    """
    values, vectors = torch.linalg.eigh(gram, UPLO="U")
    if rtol > 0:
        inverse = torch.where(values > rtol * values[-1], values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt(), 0.0)
    else:
        inverse = values.clamp_min(torch.finfo(values.dtype).tiny).rsqrt()
    return (vectors * inverse) @ vectors.T, values


class Polar(NamedTuple):
    """A stack made orthonormal, ``basis (m, k) @ root (k, k)``, and of its Gram matrix' eigenvalues how many were
    ``kept`` and the ``weakest`` of them, relative to the largest.
    """

    basis: Tensor
    root: Tensor
    kept: int
    weakest: float


def polar(stack: Float[Tensor, "m k"], *, rtol: float) -> Polar:
    """Return the polar factor of a stack and how well it is determined; see :func:`inv_sqrt_polar`.

    The two factors stay apart, so that a product with small matrices is taken before the one with the long side. They
    are float64, unless the stack is float32 and the cut-off bounds what rounding can do.
    """
    basis = stack if rtol >= SINGLE else stack.double()
    if rtol == 0:
        basis, S, root = torch.linalg.svd(basis, full_matrices=False)
        values = S.square()
        if len(S) and float(S[-1]) < DEPENDENT * float(S[0]):
            warnings.warn(
                "Columns of the stack depend on each other, so that part of the polar factor is arbitrary. "
                "Experts this close need a cut-off: set whiten_rtol to 0.01 or more.",
                RuntimeWarning,
                stacklevel=3,
            )
    else:
        root, values = inverse_root(_upper_gram(basis.T), rtol=rtol)
    relative = (values / values.max()).clamp_min(0) if len(values) else values
    kept = relative[relative > rtol] if rtol else relative
    return Polar(basis, root, len(kept), float(kept.min()) if len(kept) else 1.0)


def inv_sqrt_polar(stack: Float[Tensor, "m k"], *, rtol: float = 1e-4) -> Float[Tensor, "m k"]:
    r"""Return :math:`S (S^T S)^{-1/2}`, the matrix with orthonormal columns closest to the stack.

    Args:
        stack: Columns to make orthonormal, for example the singular vectors of several experts side by side.
        rtol: Eigenvalues of the Gram matrix below this share of the largest are dropped, so that columns that say the
            same thing share one direction. ``0`` keeps all and gives the exact polar factor, by a full decomposition.

    Example:
        >>> column = torch.tensor([[1.0], [0.0]])
        >>> inv_sqrt_polar(torch.cat([column, column], 1)) @ torch.ones(2)
        tensor([1.4142, 0.0000])
    """
    found = polar(stack, rtol=rtol)
    return (found.basis @ found.root).to(stack.dtype)


def product_svd(left: Float[Tensor, "*b m k"], right: Float[Tensor, "*b k n"]) -> SVD:
    r"""Return the singular value decomposition of ``left @ right`` without forming the product.

    With :math:`L = Q_L R_L` and :math:`R^T = Q_R R_R` it is that of the small core :math:`R_L R_R^T`, turned back by
    the two orthonormal bases: :math:`O((m + n) k^2 + k^3)` work instead of :math:`O(m n \min(m, n))`.

    Args:
        left: Left factor, or a stack of them.
        right: Right factor, or a stack of them.

    Example:
        >>> product_svd(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 0.0]])).S
        tensor([10.])
    """
    base_left, core_left = torch.linalg.qr(left)
    base_right, core_right = torch.linalg.qr(right.mT)
    U, S, Vh = torch.linalg.svd(core_left @ core_right.mT, full_matrices=False)
    return SVD(base_left @ U, S, base_right @ Vh.mT)
