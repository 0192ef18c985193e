"""Iso-C in a common subspace, completed by the directions that are each expert's own (Iso-CTS).

Better than Iso-C for many experts. ``common`` 0.8 is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modicum.linalg import inv_sqrt_polar, truncated_svd
from modicum.registry import merge_method
from modicum.types import UnitInterval
from modicum.weights.kernels.matrices import merge_matrices
from modicum.weights.methods.iso_c import flatten_spectrum


def _floats(n: int, _: Mapping[str, Any]) -> float:
    return 9 * (n + 1)


@merge_method(
    "iso_cts",
    paper="arXiv:2502.04959",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift"},
    matrix=True,
    floats=_floats,
)
def iso_cts(base: Tensor, experts: Sequence[Tensor], *, scale: float = 1.0, common: UnitInterval = 0.8) -> Tensor:
    r"""Join the leading directions of the summed delta and those of each expert's rest, all equally strong.

    .. math::
        \theta = \theta_0 + \lambda\, \bar\sigma\, U_\perp V_\perp^T, \quad
        U = [U_1 \dots U_T\ U_c], \quad U_t\ \text{leading left vectors of}\ (I - U_c U_c^T)\, \tau_t

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        scale: Factor on the merged delta (lambda).
        common: Share of directions taken from the sum; the rest is divided between the experts.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Example:
        >>> import torch
        >>> iso_cts(torch.zeros(2, 2), [torch.diag(torch.tensor([3.0, 1.0]))])
        tensor([[2., 0.],
                [0., 2.]])

    Cost:
        One symmetric eigendecomposition of the short side for each expert and for the sum, two of the stacks.

    Deviates:
        Directions of singular value zero are left out, and where the experts' shares do not fit, each gets one
        direction less.

    Reference:
        Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces", ICML
        2025, arXiv:2502.04959, Algorithm 2.
    """

    def merge(deltas: list[Tensor]) -> Tensor:
        total = torch.stack(deltas).sum(0).double()
        short, n = min(total.shape), len(deltas)
        own = min(round((short - int(short * common)) / n), short // n)
        if own == 0:
            return scale * flatten_spectrum(total).to(deltas[0].dtype)
        rests, parts = [delta.double() for delta in deltas], []
        if own * n < short:
            shared = truncated_svd(total, short - own * n)
            rests = [rest - shared.U @ (shared.U.T @ rest) for rest in rests]
            parts = [shared]
        parts = [*(truncated_svd(rest, own) for rest in rests), *parts]
        strongest = max(float(part.S.max()) for part in parts)
        live = [1e-6 * strongest < part.S for part in parts]
        U = torch.cat([part.U[:, keep] for part, keep in zip(parts, live)], 1)
        V = torch.cat([part.V[:, keep] for part, keep in zip(parts, live)], 1)
        strength = torch.cat([part.S for part in parts]).mean()
        if not U.shape[1]:
            return torch.zeros_like(deltas[0])
        merged = strength * inv_sqrt_polar(U, rtol=1e-12) @ inv_sqrt_polar(V, rtol=1e-12).T
        return scale * merged.to(deltas[0].dtype)

    return merge_matrices(base, experts, merge)
