r"""FZOO: several one-sided probes along random signs, with steps measured in standard deviations of their losses."""

from __future__ import annotations

from typing import Annotated, Any, Unpack

from annotated_types import Ge
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import known
from modicum.optim.zeroth_order.settings import Settings, Shared
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import NonNegative, Positive


@zeroth_order("fzoo", paper="arXiv:2506.09034")
class FZOO(ZerothOrder):
    r"""Fine-tune with forward passes along random signs, normalized by the spread of the losses.

    .. math::
        u_i \in \{-1, 1\}^d, \quad \ell_i = f(W + \rho u_i), \quad
        W \leftarrow W - \frac{\eta}{N\sigma} \sum_i (\ell_i - \ell_0)\,u_i, \quad
        \sigma^2 = \tfrac{1}{N-1}\textstyle\sum_i(\ell_i - \bar\ell)^2

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`; the step does not depend on the loss's scale.
        eps: Radius :math:`\rho` of the probe.
        queries: Number N of directions, at least 2.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.Shared`.

    Raises:
        RecipeError: A knob is out of range, or nothing is left to train.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = FZOO(model.named_parameters(), lr=0.02)
        >>> losses = [float(optimizer.step(lambda: (model(torch.eye(3)) - 3).square().sum())) for _ in range(300)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        N + 1 forward passes and N + 1 passes over the weights; no state.

    Deviates:
        The probes run one after another; passes between two directions are fused.

    Reference:
        Dang et al., "FZOO: Fast Zeroth-Order Optimizer for Fine-Tuning Large Language Models towards Adam-Scale
        Speed", ICLR 2026, arXiv:2506.09034, Algorithm 1.
    """

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-4,
        queries: Annotated[int, Ge(2)] = 8,
        **shared: Unpack[Shared],
    ) -> None:
        if queries < 2:
            raise RecipeError(f"queries is {queries}, expected at least 2: the step is measured in their spread.")
        settings = Settings(
            lr=lr,
            eps=eps,
            queries=queries,
            sides=1,
            distribution="rademacher",
            **known(FZOO, shared),
        )
        super().__init__(params, settings)

    def _coefficients(self, losses: Tensor) -> Tensor:
        # Equal losses have no spread; the floor turns 0/0 into a step of zero.
        return (losses[1:] - losses[0]) / losses[1:].std().clamp_min(1e-30)
