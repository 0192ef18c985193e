r"""Sparse-MeZO: dense directions on the small weights only."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from modicum.knobs import known
from modicum.optim.zeroth_order.leaves import Chunk, Leaf
from modicum.optim.zeroth_order.offsets import Key
from modicum.optim.zeroth_order.settings import Settings, Shared
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import Fraction, NonNegative, Positive


@zeroth_order("sparse_mezo", paper="arXiv:2402.15751")
class SparseMeZO(ZerothOrder):
    r"""Fine-tune with forward passes along random directions of the smallest weights.

    .. math::
        Z_t = \mathbb 1[|W| \le h] \odot z_t, \quad z_t \sim N(0, I), \quad W \leftarrow W - \eta\,\kappa_t Z_t

    The threshold :math:`h` of each matrix is a quantile of its magnitudes before training; which entries lie below it
    is looked up anew at the start of each step, and then stays for all its passes.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        density: Share of each matrix that moves at first.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.Shared`.

    Raises:
        RecipeError: A knob is out of range, or nothing is left to train.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = SparseMeZO(model.named_parameters(), lr=0.02, density=1.0)
        >>> losses = [float(optimizer.step(lambda: (model(torch.eye(3)) - 3).square().sum())) for _ in range(300)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        As MeZO, and one byte for each entry of the matrices.

    Deviates:
        The mask is kept for the length of a step, so that probe and update agree; biases and norms move whole.

    Reference:
        Liu et al., "Sparse MeZO: Less Parameters for Better Performance in Zeroth-Order LLM Fine-Tuning", 2024,
        arXiv:2402.15751, Algorithm 1.
    """

    shaped = True

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        density: Fraction = 0.25,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(params, Settings(lr=lr, eps=eps, **known(SparseMeZO, shared)))
        matrices = [leaf for leaf in self.leaves if leaf.param.dim() >= 2]
        self._thresholds = {leaf.name: _quantile(leaf.local(), density) for leaf in matrices}
        self._masks: dict[str, Tensor] = {}

    def _begin(self) -> None:
        super()._begin()
        for leaf in self.leaves:
            if leaf.name in self._thresholds:
                self._masks[leaf.name] = leaf.local().abs() <= self._thresholds[leaf.name]

    def _direction(self, leaf: Leaf, chunk: Chunk, key: Key) -> Tensor:
        drawn = super()._direction(leaf, chunk, key)
        return drawn * self._masks[leaf.name][chunk.rows] if leaf.name in self._masks else drawn

    def _more_state(self) -> dict[str, Any]:
        return {"thresholds": self._thresholds}

    def _load_more_state(self, state: dict[str, Any]) -> None:
        self._thresholds = {name: h.to(self._thresholds[name].device) for name, h in state["thresholds"].items()}


def _quantile(weight: Tensor, share: float) -> Tensor:
    """Return the magnitude that the given share of the entries does not exceed."""
    magnitudes = weight.abs().flatten()
    return torch.kthvalue(magnitudes, max(1, round(share * magnitudes.numel()))).values
