r"""ConMeZO: directions from a cone around the momentum."""

from __future__ import annotations

import math
from typing import Annotated, Any, Unpack

import torch
from annotated_types import Ge, Le
from torch import Tensor

from modicum.errors import UnsupportedError
from modicum.knobs import known
from modicum.optim.zeroth_order.leaves import Chunk, Leaf
from modicum.optim.zeroth_order.offsets import Key
from modicum.optim.zeroth_order.settings import Settings, Shared
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import Decay, NonNegative, Positive


@zeroth_order("conmezo", paper="arXiv:2511.02757")
class ConMeZO(ZerothOrder):
    r"""Fine-tune with forward passes along directions that lean towards where the last ones led.

    .. math::
        Z_t = \cos\theta\,\sqrt d\,\frac{m_t}{\|m_t\|} + \sin\theta\,z_t, \quad
        m_{t+1} = \beta m_t + (1-\beta)\,\kappa_t Z_t, \quad W \leftarrow W - \eta\,\kappa_t Z_t

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        angle: Half-angle :math:`\theta` of the cone in radians; :math:`\pi/2` is MeZO.
        beta: Memory of the momentum.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.Shared`.

    Raises:
        RecipeError: A knob is out of range, or nothing is left to train.
        UnsupportedError: The weights are sharded: the momentum's length would be that of a shard.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = ConMeZO(model.named_parameters(), lr=0.02)
        >>> losses = [float(optimizer.step(lambda: (model(torch.eye(3)) - 3).square().sum())) for _ in range(300)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        As MeZO, and one more model of memory.

    Deviates:
        The Gaussian part is not normalized to length :math:`\sqrt d`, which it has up to :math:`O(1)`; the momentum has
        no warm-up, and the first step is MeZO's.

    Reference:
        "ConMeZO: Adaptive Descent-Direction Sampling for Gradient-Free Finetuning of Large Language Models",
        AISTATS 2026, arXiv:2511.02757, Algorithm 1.
    """

    shaped = True

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        angle: Annotated[float, Ge(0), Le(math.pi / 2)] = 1.35,
        beta: Decay = 0.99,
        **shared: Unpack[Shared],
    ) -> None:
        settings = Settings(lr=lr, eps=eps, update="momentum", betas=(beta, 0.0), **known(ConMeZO, shared))
        super().__init__(params, settings)
        if any(hasattr(leaf.param, "to_local") for leaf in self.leaves):
            raise UnsupportedError("ConMeZO needs the whole momentum's length, which a shard does not have. Use MeZO.")
        self._angle = angle
        self._square = torch.zeros(())  # squared length of the momentum
        self._total = sum(leaf.param.numel() for leaf in self.leaves)

    def _direction(self, leaf: Leaf, chunk: Chunk, key: Key) -> Tensor:
        drawn = super()._direction(leaf, chunk, key)
        mean = self._dense_memory_of(leaf)[0][chunk.rows]
        length = (self._square / self._total).sqrt().to(drawn)
        leaning = math.cos(self._angle) * mean / length + math.sin(self._angle) * drawn
        return torch.where(length > 0, leaning, drawn)

    def _apply(self, kappas: Tensor) -> None:
        super()._apply(kappas)
        squares = [parts[0].square().sum(dtype=torch.float64).cpu() for parts in self.dense_memory.values()]
        self._square = torch.stack(squares).sum()

    def _dense_update(
        self, _leaf: Leaf, _chunk: Chunk, kappas: Tensor, directions: list[Tensor], state: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        gradient = kappas[0] * directions[0]
        return gradient, (state[0].lerp(gradient, 1 - self.settings.betas[0]),)

    def _more_state(self) -> dict[str, Any]:
        return {"square": self._square}

    def _load_more_state(self, state: dict[str, Any]) -> None:
        self._square = state["square"]
