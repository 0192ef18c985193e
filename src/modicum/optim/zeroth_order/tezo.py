r"""TeZO: directions from one fixed set of rank-one matrices; a step draws only their weights.

All directions of a run share :math:`U` and :math:`V`, drawn once, so that momentum and Adam remember a few numbers per
layer instead of copies of the model. It also means that the plain and momentum variants never leave
:math:`W_0 + U\,diag(\lambda)V^\top`: a run *is* its seed and :math:`\lambda`, the adapter engine never writes the
weights, and the change of each matrix has at most the chosen rank. ``refresh_every`` lifts that limit.

Begin with ``variant="sgd"`` or ``"adam"``, ``rank=32`` (16 for small models) and, at ``scale="unit"``, the learning
rates of MeZO; Adam wants those of Adam (1e-4 to 1e-3 on small models).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any, Literal, Unpack

from annotated_types import Gt, Lt
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import known
from modicum.optim.zeroth_order.leaves import Ranks
from modicum.optim.zeroth_order.lifts import Diagonal, Scale
from modicum.optim.zeroth_order.ranks import Criterion, Scope, select_ranks, singular_values
from modicum.optim.zeroth_order.settings import LowRank, Settings, check_variant
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import Decay, NonNegative, Positive, PositiveInt

Threshold = Annotated[float, Gt(0), Lt(1)]
UPDATE = {"sgd": "sgd", "momentum": "momentum", "adam": "adam", "lion": "lion", "factor_adam": "adam"}


@zeroth_order("tezo", paper="arXiv:2501.19057")
class TeZO(ZerothOrder):
    r"""Fine-tune with forward passes along a fixed set of rank-one directions.

    .. math::
        Z_t = U\,diag(\tau_t)\,V^\top, \quad \tau_t \sim N(0, I_r), \quad
        \kappa_t = \frac{f(W + \rho Z_t) - f(W - \rho Z_t)}{2\rho}

    With :math:`m_t, v_t \in R^r` the moving averages of :math:`\kappa_t\tau_t` and its square:
    ``sgd`` :math:`W \leftarrow W - \eta\kappa_t Z_t`; ``momentum`` :math:`W \leftarrow W - \eta U\,diag(m_t)V^\top`;
    ``adam`` :math:`W \leftarrow W - \eta M/\sqrt{U^{\odot 2}diag(v_t)(V^{\odot 2})^\top + \epsilon}` entry by entry;
    ``lion`` the entry-wise sign; ``factor_adam`` Adam on the coordinates, which stays in the subspace.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        rank: Rank-one directions for each matrix, clamped to its shorter side; ``"auto"`` reads them off the weights.
        variant: How the estimates become a step.
        scale: ``unit`` gives a direction the energy of a Gaussian one; ``none`` is the algorithm as published;
            ``unbiased`` divides the update by the rank.
        betas: Memories of the two moving averages.
        adam_eps: Added under the root (``adam``) or beside it (``factor_adam``).
        bias_correction: Correct the moving averages' start at zero.
        refresh_every: Draw new factors after so many steps; never when not given.
        rank_criterion: See :func:`~modicum.optim.zeroth_order.ranks.numerical_rank`; this and the following for
            ``rank="auto"``.
        rank_threshold: See there.
        rank_scope: See :func:`~modicum.optim.zeroth_order.ranks.select_ranks`.
        rank_max: Upper limit.
        target_mean_rank: Choose the threshold by the mean rank it gives.
        **shared: See :class:`~modicum.optim.zeroth_order.settings.LowRank`.

    Raises:
        RecipeError: A knob is out of range, or no matrix is left to train.
        UnsupportedError: The combination of knobs and tensors cannot be done.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> x, y = torch.eye(3), torch.ones(3, 2)
        >>> optimizer = TeZO(model.named_parameters(), lr=0.1, rank=2)
        >>> losses = [float(optimizer.step(lambda: (model(x) - y).square().mean())) for _ in range(200)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        Two forward passes per query; :math:`\sum r(m+n)` numbers of factors in the weights' dtype; state 0 (``sgd``),
        :math:`R=\sum r` (``momentum``, ``lion``) or :math:`2R` numbers, and for vectors
        as many as a dense update needs.

    Deviates:
        The published text that could be consulted leaves open the scale (default here: ``unit``), the second beta,
        bias correction, the rank criterion, what happens to vectors, and all of ``lion``; these are our choice.
        ``factor_adam``, ``refresh_every``, ``queries`` and the engines are additions.

    Reference:
        Sun, Huang, Ding, Shen, Tao, "TeZO: Empowering the Low-Rankness on the Temporal Dimension in the Zeroth-Order
        Optimization for Fine-tuning LLMs", 2025, arXiv:2501.19057, section 4.
    """

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        rank: PositiveInt | Literal["auto"] = 32,
        variant: Literal["sgd", "momentum", "adam", "lion", "factor_adam"] = "sgd",
        *,
        scale: Scale = "unit",
        betas: tuple[Decay, Decay] = (0.9, 0.99),
        adam_eps: Positive = 1e-8,
        bias_correction: bool = True,
        refresh_every: PositiveInt | None = None,
        rank_criterion: Criterion = "ratio",
        rank_threshold: Threshold = 0.25,
        rank_scope: Scope = "block",
        rank_max: PositiveInt = 64,
        target_mean_rank: Positive | None = None,
        **shared: Unpack[LowRank],
    ) -> None:
        check_variant(variant, UPDATE)
        self._select = partial(
            select_ranks,
            criterion=rank_criterion,
            threshold=rank_threshold,
            scope=rank_scope,
            largest=rank_max,
            target_mean_rank=target_mean_rank,
        )
        settings = Settings(
            lr=lr,
            eps=eps,
            variant=variant,
            update=UPDATE[variant],
            entrywise=variant in ("adam", "lion"),
            lift=Diagonal(),
            ranks=fixed_rank(rank) if rank != "auto" else self._ranks_from_weights,
            scale=scale,
            refresh_every=refresh_every,
            betas=betas,
            adam_eps=adam_eps,
            bias_correction=bias_correction,
            **known(TeZO, shared),
        )
        super().__init__(params, settings)

    def _ranks_from_weights(self, matrices: Mapping[str, Tensor]) -> dict[str, int]:
        spectra = {}
        for name, matrix in matrices.items():
            values = singular_values(matrix if matrix.dim() <= 3 else matrix.flatten(1))
            spectra[name] = values if values.dim() == 1 else values.mean(0)
        return self._select(spectra)


def fixed_rank(rank: int) -> Ranks:
    """Return the choice that gives every matrix the same rank."""
    if not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"rank is {rank!r}, expected a whole number of at least 1.")
    return lambda matrices: dict.fromkeys(matrices, rank)
