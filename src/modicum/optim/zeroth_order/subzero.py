r"""SubZero: directions inside a random orthonormal subspace, which is drawn anew every so often.

``SubZero(..., variant="adam", queries=99, sides=1)`` is SubZero+: many one-sided queries in one subspace, and Adam on
the small square core.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from modicum.optim.zeroth_order.lifts import Core, Scale
from modicum.optim.zeroth_order.settings import Engine, Parallel, Settings, Vectors, check_variant
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
        queries: Directions per step, whose estimates are averaged.
        weight_decay: Decoupled decay of the matrices.
        vectors: Whether biases and norms get a dense direction or stay as they are.
        dense: Patterns (regular expressions) of matrices that get a dense direction too.
        include: Patterns of the parameters to train; all when not given.
        exclude: Patterns of parameters to leave alone.
        engine: See :class:`~modicum.optim.TeZO`; the adapter engines write the weights at each refresh.
        passes: See :class:`~modicum.optim.TeZO`.
        parallel: What several processes share out: the batch, or the queries.
        seed: Seed of all draws.

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
        queries: PositiveInt = 1,
        weight_decay: NonNegative = 0.0,
        vectors: Vectors = "dense",
        dense: Sequence[str] = (),
        include: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        engine: Engine = "mutate",
        passes: Literal[2, 3] = 3,
        parallel: Parallel = "data",
        seed: int = 0,
    ) -> None:
        check_variant(variant, ("sgd", "momentum", "adam"))
        super().__init__(
            params, Settings.of(locals(), lift=Core(), ranks=fixed_rank(rank), rule=variant, rule_eps=adam_eps)
        )
