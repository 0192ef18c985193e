r"""A concave function of sums: what is well served already gains less."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.submodular.functions.base import Matrix, SetFunction, matrix, pieces, row_weights, weighted


class ConcaveOverModular(SetFunction):
    r"""Serve every row by the sum over elements, with diminishing returns.

    .. math::
        f(A) = \sum_j w_j\, \varphi\Bigl(\sum_{a \in A} s_{ja}\Bigr)

    Args:
        S: Numbers ≥ 0, (rows, elements); a third dimension before them goes over worlds.
        weights: A weight ≥ 0 for each row; 1 where not given.
        phi: ``sqrt``, ``log1p``, or ``min`` for the smaller of the sum and ``tau``.
        tau: Where ``min`` saturates.

    Raises:
        RecipeError: A number is negative or not finite, or ``tau`` is missing or not positive.

    Example:
        >>> f = ConcaveOverModular([[4.0, 5.0]], phi="sqrt")
        >>> float(f.value([True, True])), f.gains([True, False], [1]).tolist()
        (3.0, [1.0])

    Cost:
        A value: rows × elements, as one product of matrices. There is no closed form of its extension.

    Reference:
        Lin and Bilmes, "A Class of Submodular Functions for Document Summarization", ACL 2011, section 4.
    """

    trusted = True

    def __init__(
        self,
        S: Matrix,
        *,
        weights: Matrix | None = None,
        phi: Literal["sqrt", "log1p", "min"] = "sqrt",
        tau: float | None = None,
    ) -> None:
        if phi not in ("sqrt", "log1p", "min"):
            raise RecipeError(f"phi is {phi!r}, expected sqrt, log1p or min.")
        if (phi == "min") != (tau is not None):
            raise RecipeError(f"phi is {phi!r} and tau {tau}: tau belongs to phi='min', which needs it.")
        if tau is not None and not 0 < tau < float("inf"):
            raise RecipeError(f"tau is {tau}, expected a number above 0.")
        self.S = matrix(S, "S")
        self.weights = row_weights(weights, self.S)
        self.worlds, self.n = tuple(self.S.shape[:-2]), self.S.shape[-1]
        self.dtype, self.device = self.S.dtype, self.S.device
        self.phi, self.tau = phi, tau

    def value(self, mask: Any) -> Tensor:
        """Return the value of each set (see :meth:`SetFunction.value`)."""
        found = self._mask(mask)
        sums = self._rows(found) @ self.S.mT
        return weighted(self._concave(sums), self._weights).reshape(found.shape[:-1])

    def gains(self, mask: Any, block: Any) -> Tensor:
        """Return what each element adds to each set (see :meth:`SetFunction.gains`)."""
        found = self._mask(mask)
        batch = tuple(found.shape[:-1])
        rows, block = self._rows(found), self._block(block, batch)
        sums, places = rows @ self.S.mT, block.reshape(self._count, -1, block.shape[-1])
        table = (self.S if self.worlds else self.S[None]).mT
        world = torch.arange(self._count, device=self.device)[:, None, None]
        out = []
        for part in pieces(rows.shape[1], block.shape[-1] * self.S.shape[-2] * self._count):
            some = places[:, part]
            own = table[world, some]
            # An element of the set alone is taken away exactly: the difference may come out below 0 by rounding.
            rest = (sums[:, part, None] - rows[:, part].gather(-1, some)[..., None] * own).clamp_(min=0)
            out.append(weighted(self._concave(rest + own) - self._concave(rest), self._weights))
        return torch.cat(out, 1).reshape(*batch, -1)

    def _concave(self, sums: Tensor) -> Tensor:
        if self.phi == "min":
            return sums.clamp(max=self.tau)
        return sums.sqrt() if self.phi == "sqrt" else sums.log1p()

    def _rows(self, mask: Tensor) -> Tensor:
        return mask.reshape(self._count, -1, self.n).to(self.dtype)

    @property
    def _weights(self) -> Tensor:
        return self.weights if self.worlds or self.weights.ndim == 2 else self.weights[None].expand(1, -1)
