r"""HiZOO: directions scaled by a running estimate of the diagonal Hessian, from a third forward pass."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from modicum.knobs import known
from modicum.optim.zeroth_order.leaves import Chunk, Leaf
from modicum.optim.zeroth_order.moments import spsa_coefficient
from modicum.optim.zeroth_order.offsets import Key, Offset
from modicum.optim.zeroth_order.settings import Settings, Shared
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import NonNegative, Positive, UnitInterval


@zeroth_order("hizoo", paper="arXiv:2402.15173")
class HiZOO(ZerothOrder):
    r"""Fine-tune with forward passes, with smaller steps where the loss is curved.

    .. math::
        Z_t = z_t / \sqrt{H_t}, \quad
        H_{t+1} = (1-\alpha) H_t + \alpha \frac{|\ell_+ + \ell_- - 2\ell_0|}{2\rho^2} H_t \odot z_t^2, \quad
        W \leftarrow W - \eta\,\kappa_t z_t / \sqrt{H_{t+1}}

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        smooth: Share :math:`\alpha` of the new curvature.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.Shared`.

    Raises:
        RecipeError: A knob is out of range, or nothing is left to train.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = HiZOO(model.named_parameters(), lr=0.02)
        >>> losses = [float(optimizer.step(lambda: (model(torch.eye(3)) - 3).square().sum())) for _ in range(300)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        Three forward passes, four passes over the weights, and one more model of memory.

    Deviates:
        No fourth forward pass for logging.

    Reference:
        Zhao et al., "Second-Order Fine-Tuning without Pain for LLMs: A Hessian Informed Zeroth-Order Optimizer",
        ICLR 2025, arXiv:2402.15173, Algorithm 1.
    """

    shaped = True
    replayable = False  # coefficients do not tell the curvature that their steps measured

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        smooth: UnitInterval = 1e-6,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(params, Settings(lr=lr, eps=eps, **known(HiZOO, shared)))
        self._smooth = smooth
        self._curvature = torch.zeros(())

    def _plan(self) -> list[Offset]:
        return [{}, *super()._plan()]

    def _coefficients(self, losses: Tensor) -> Tensor:
        eps = self.settings.eps
        middle, plus, minus = losses
        self._curvature = (plus + minus - 2 * middle).abs() / (2 * eps**2)
        return spsa_coefficient(plus, minus, eps=eps).view(1)

    def _new_dense_memory(self, leaf: Leaf, like: Tensor) -> list[Tensor]:
        return [torch.ones_like(like, dtype=leaf.compute_dtype)]

    def _direction(self, leaf: Leaf, chunk: Chunk, key: Key) -> Tensor:
        return super()._direction(leaf, chunk, key) * self._dense_memory_of(leaf)[0][chunk.rows].rsqrt()

    def _dense_update(
        self, _leaf: Leaf, _chunk: Chunk, kappas: Tensor, directions: list[Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (hessian,), scaled = state, directions[0]
        # The direction was z / sqrt(H), so z² H is (Z H)².
        curved = (scaled * hessian).square() * self._curvature.to(scaled)
        new = hessian.lerp(curved, self._smooth)
        return kappas[0] * scaled * (hessian / new).sqrt(), (new,)
