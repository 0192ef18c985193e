r"""LOZO: low-rank directions whose right factor is kept for a while and whose left factor is fresh each step.

Probe and update use the same factors at every step, refresh steps included. (In the published code the update of a
refresh step draws other numbers than its probe; at ``refresh_every=1`` that leaves nothing but noise.)
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

from torch import Tensor

from modicum.knobs import known
from modicum.optim.zeroth_order.leaves import Leaf
from modicum.optim.zeroth_order.lifts import Left, Scale
from modicum.optim.zeroth_order.settings import LowRank, Settings, check_variant
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.optim.zeroth_order.tezo import fixed_rank
from modicum.registry import zeroth_order
from modicum.types import Decay, NonNegative, Positive, PositiveInt


@zeroth_order("lozo", paper="arXiv:2410.07698")
class LOZO(ZerothOrder):
    r"""Fine-tune with forward passes along :math:`U_t V^\top`, with :math:`V` kept for ``refresh_every`` steps.

    .. math::
        Z_t = U_t V^\top, \quad \kappa_t = \frac{f(W + \rho Z_t) - f(W - \rho Z_t)}{2\rho}, \quad
        W \leftarrow W - \eta\,\kappa_t Z_t

    ``momentum`` keeps :math:`N \leftarrow \beta N + (1-\beta)\kappa_t U_t` and steps along :math:`N V^\top`; at a
    refresh :math:`N \leftarrow N\,V_{old}^\top V_{new}/n`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        rank: Columns of the factors, clamped to a matrix's shorter side.
        variant: Plain, or with momentum.
        refresh_every: Steps for which the right factor is kept.
        scale: See :class:`~modicum.optim.TeZO`.
        beta: Memory of the momentum.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.LowRank`.

    Raises:
        RecipeError: A knob is out of range, or no matrix is left to train.
        UnsupportedError: The combination of knobs and tensors cannot be done.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = LOZO(model.named_parameters(), lr=0.05, rank=2)
        >>> losses = [float(optimizer.step(lambda: model(torch.eye(3)).square().sum())) for _ in range(200)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        As TeZO; :math:`\sum mr` draws per step, :math:`\sum nr` kept numbers, as many again as draws for momentum.

    Deviates:
        Factors of probe and update agree at refresh steps. The first momentum is :math:`(1-\beta)\kappa U`, not
        :math:`\kappa U`. The paper's factor 1/r is ``scale="unbiased"``; its code's learning rate is ``"none"``.

    Reference:
        Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures", ICLR 2025,
        arXiv:2410.07698, Algorithms 1 and 2.
    """

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        rank: PositiveInt = 2,
        variant: Literal["sgd", "momentum"] = "sgd",
        *,
        refresh_every: PositiveInt = 50,
        scale: Scale = "unit",
        beta: Decay = 0.9,
        **shared: Unpack[LowRank],
    ) -> None:
        check_variant(variant, ("sgd", "momentum"))
        settings = Settings(
            lr=lr,
            eps=eps,
            variant=variant,
            update=variant,
            lift=Left(),
            ranks=fixed_rank(rank),
            scale=scale,
            refresh_every=refresh_every,
            betas=(beta, 0.0),
            **known(LOZO, shared),
        )
        super().__init__(params, settings)

    def _carry(self, leaf: Leaf, _old: tuple[Tensor, ...]) -> None:
        for memory in self.memory:
            before, after = _old[0].to(memory.dtype), leaf.basis[0].to(memory.dtype)
            kept = memory[leaf.coordinates].view(*leaf.shape[:-1], leaf.rank)
            memory[leaf.coordinates] = (kept @ (before.mT @ after) / leaf.shape[-1]).flatten()
