r"""SubZero: directions inside a random orthonormal subspace, which is drawn anew every so often.

``SubZero(..., variant="adam", queries=99, sides=1)`` is SubZero+: many one-sided queries in one subspace, and Adam on
the small square core.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

from modicum.knobs import known
from modicum.optim.zeroth_order.lifts import Core, Scale
from modicum.optim.zeroth_order.settings import LowRank, Settings, check_variant
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.optim.zeroth_order.tezo import fixed_rank
from modicum.registry import zeroth_order
from modicum.types import Decay, NonNegative, Positive, PositiveInt


@zeroth_order("subzero", paper="arXiv:2410.08989")
class SubZero(ZerothOrder):
    r"""Fine-tune with forward passes along :math:`U S_t V^\top`, with orthonormal :math:`U, V` kept for a while.

    .. math::
        Z_t = \frac{\sqrt{mn}}{r}\,U S_t V^\top, \quad S_t \sim N(0, 1)^{r \times r}, \quad
        W \leftarrow W - \eta\,\kappa_t Z_t

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        rank: Side of the core, clamped to a matrix's shorter side.
        variant: Plain, with momentum, or with Adam on the core (SubZero+).
        refresh_every: Steps for which the subspace is kept.
        sides: 2 probes at plus and minus each direction; 1 at each direction and once at the weights themselves.
        scale: ``unit`` is the formula above; ``none`` leaves the factor out; ``unbiased`` puts its
            square into the update.
        betas: Memories of the moving averages.
        adam_eps: Added beside the root.
        bias_correction: Correct the moving averages' start at zero.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.LowRank`.

    Raises:
        RecipeError: A knob is out of range, or no matrix is left to train.
        UnsupportedError: The combination of knobs and tensors cannot be done.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> optimizer = SubZero(model.named_parameters(), lr=0.05, rank=2)
        >>> losses = [float(optimizer.step(lambda: model(torch.eye(3)).square().sum())) for _ in range(200)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        As TeZO; :math:`\sum r^2` draws per step, :math:`\sum r(m+n)` kept numbers and a QR of them at each refresh.

    Deviates:
        No sign correction of the QR: the law of :math:`U S V^\top` does not change with the signs. The state of
        ``momentum`` and ``adam`` starts anew at a refresh.

    Reference:
        Yu et al., "Zeroth-Order Fine-Tuning of LLMs in Random Subspaces", 2024, arXiv:2410.08989, Algorithm 1;
        SubZero+: arXiv:2608.15665.
    """

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        rank: PositiveInt = 24,
        variant: Literal["sgd", "momentum", "adam"] = "sgd",
        *,
        refresh_every: PositiveInt = 1000,
        sides: Literal[1, 2] = 2,
        scale: Scale = "unit",
        betas: tuple[Decay, Decay] = (0.9, 0.95),
        adam_eps: Positive = 1e-8,
        bias_correction: bool = True,
        **shared: Unpack[LowRank],
    ) -> None:
        check_variant(variant, ("sgd", "momentum", "adam"))
        settings = Settings(
            lr=lr,
            eps=eps,
            variant=variant,
            update=variant,
            lift=Core(),
            ranks=fixed_rank(rank),
            scale=scale,
            refresh_every=refresh_every,
            sides=sides,
            betas=betas,
            adam_eps=adam_eps,
            bias_correction=bias_correction,
            **known(SubZero, shared),
        )
        super().__init__(params, settings)
