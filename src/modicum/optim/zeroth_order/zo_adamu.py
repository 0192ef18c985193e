r"""ZO-AdaMU: the momentum perturbs, rather than smooths, the direction."""

from __future__ import annotations

import math
from typing import Any, Unpack

from torch import Tensor

from modicum.knobs import known
from modicum.optim.zeroth_order.leaves import Chunk, Leaf
from modicum.optim.zeroth_order.offsets import Key
from modicum.optim.zeroth_order.settings import Settings, Shared
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import NonNegative, NonNegativeInt, Positive, PositiveInt


@zeroth_order("zo_adamu", paper="arXiv:2312.15184")
class ZOAdaMU(ZerothOrder):
    r"""Fine-tune with forward passes along a mixture of fresh noise and noise around the last direction.

    .. math::
        \dot z \sim N(0, \alpha_t), \quad \ddot z \sim N(m_{t-1}, 1 - \alpha_t), \quad
        m_t = Z_t = \beta_1 \dot z + (1-\beta_1)\ddot z, \quad
        v_t = \beta_2 \dot z^2 + (1-\beta_2)\ddot z^2, \quad W \leftarrow W - \eta\,\kappa_t m_t/\sqrt{v_t + 10^{-8}}

    :math:`\alpha, \beta_1, \beta_2` are 1 at first, fall along half a cosine, and end at 0.5, 0.9 and 0.01.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        hold: Steps at the start during which all three are 1.
        fall: Steps of the fall after that.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.Shared`.

    Raises:
        RecipeError: A knob is out of range, or nothing is left to train.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = ZOAdaMU(model.named_parameters(), lr=0.02)
        >>> losses = [float(optimizer.step(lambda: (model(torch.eye(3)) - 3).square().sum())) for _ in range(300)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        As MeZO with twice the draws, and one more model of memory.

    Deviates:
        Probe and update use the same mixture (the published code's do not), and the momentum is the last direction, as
        in the text. The shape of the fall, :math:`\tfrac12 + \tfrac12\cos(\pi x^\varphi)` with exponents 1, 0.1
        and 1.5, and its length are our reading.

    Reference:
        Jiang et al., "ZO-AdaMU Optimizer: Adapting Perturbation by the Momentum and Uncertainty in Zeroth-Order
        Optimization", AAAI 2024, arXiv:2312.15184, Algorithm 1.
    """

    shaped = True

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        hold: NonNegativeInt = 100,
        fall: PositiveInt = 1000,
        **shared: Unpack[Shared],
    ) -> None:
        super().__init__(params, Settings(lr=lr, eps=eps, update="momentum", **known(ZOAdaMU, shared)))
        self._hold, self._fall = hold, fall

    def _parts(self, leaf: Leaf, chunk: Chunk, key: Key) -> tuple[Tensor, Tensor]:
        """The fresh noise and the noise around the last direction."""
        alpha, _, _ = self._schedule()
        around = self._draw(leaf, chunk, key, purpose="around")
        last = self._dense_memory_of(leaf)[0][chunk.rows]
        return super()._direction(leaf, chunk, key) * math.sqrt(alpha), last + around * math.sqrt(1 - alpha)

    def _schedule(self) -> tuple[float, float, float]:
        return schedule(self.steps, hold=self._hold, fall=self._fall)

    def _direction(self, leaf: Leaf, chunk: Chunk, key: Key) -> Tensor:
        fresh, around = self._parts(leaf, chunk, key)
        return fresh.lerp(around, 1 - self._schedule()[1])

    def _dense_update(
        self, leaf: Leaf, chunk: Chunk, kappas: Tensor, directions: list[Tensor], _state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        fresh, around = self._parts(leaf, chunk, (self.steps, 0))
        square = fresh.square().lerp(around.square(), 1 - self._schedule()[2])
        return kappas[0] * directions[0] * (square + 1e-8).rsqrt(), (directions[0],)


def schedule(step: int, *, hold: int, fall: int) -> tuple[float, float, float]:
    """Return alpha, beta1 and beta2 of a step.

    Example:
        >>> schedule(0, hold=5, fall=10), schedule(15, hold=5, fall=10)
        ((1.0, 1.0, 1.0), (0.5, 0.9, 0.01))
    """
    if step < hold:
        return 1.0, 1.0, 1.0
    if step >= hold + fall:
        return 0.5, 0.9, 0.01
    share = (step - hold) / fall
    alpha, first, second = (0.5 + 0.5 * math.cos(math.pi * share**power) for power in (1.0, 0.1, 1.5))
    return alpha, first, second
