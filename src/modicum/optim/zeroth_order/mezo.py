r"""MeZO: zeroth-order fine-tuning along dense Gaussian directions that are drawn again from their seed when needed.

The reference point of the family. Memory is that of inference for ``sgd`` and ``scalar``; ``momentum`` and ``adam``
remember one and two more models. ``queries`` above one makes it n-SPSA; ``scalar`` is the one-number second moment of
MEAZO. Learning rates are small: 1e-7 to 1e-6 at 13 B parameters, up to 1e-3 for a toy.
"""

from __future__ import annotations

from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from modicum.knobs import known
from modicum.optim.zeroth_order.settings import Settings, Unshaped, check_variant
from modicum.optim.zeroth_order.step import ZerothOrder
from modicum.registry import zeroth_order
from modicum.types import Decay, NonNegative, Positive

UPDATE = {"sgd": "sgd", "momentum": "momentum", "adam": "adam", "lion": "lion", "scalar": "sgd"}


@zeroth_order("mezo", paper="arXiv:2305.17333")
class MeZO(ZerothOrder):
    r"""Fine-tune with forward passes along dense random directions.

    .. math::
        z_t \sim N(0, I), \quad \kappa_t = \frac{f(W + \rho z_t) - f(W - \rho z_t)}{2\rho}, \quad
        W \leftarrow W - \eta\,\kappa_t z_t

    ``momentum``, ``adam`` and ``lion`` apply these updates to :math:`\kappa_t z_t`; ``scalar`` divides
    :math:`\kappa_t` by :math:`\sqrt{\hat v_t} + \epsilon`, with :math:`\hat v_t` the moving average of
    :math:`\kappa_t^2`.

    Args:
        params: Parameters, ``(name, parameter)`` pairs (best: the draws follow the names) or parameter groups.
        lr: Learning rate :math:`\eta`.
        eps: Radius :math:`\rho` of the probe.
        variant: How the estimates become a step.
        sides: 2 probes at plus and minus each direction; 1 at each direction and once at the weights themselves.
        betas: Memories of the two moving averages; ``scalar`` uses the second.
        adam_eps: Added beside the root.
        bias_correction: Correct the moving averages' start at zero.
        engine: ``mutate`` writes the weights; ``jvp`` takes the exact derivative (a reference; memory of two models).
        **shared: See :class:`~modicum.optim.zeroth_order.settings.Unshaped`.

    Raises:
        RecipeError: A knob is out of range, or nothing is left to train.
        UnsupportedError: The combination of knobs and tensors cannot be done.

    Example:
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> optimizer = MeZO(model.named_parameters(), lr=0.05)
        >>> losses = [float(optimizer.step(lambda: model(torch.eye(3)).square().sum())) for _ in range(200)]
        >>> losses[-1] < losses[0]
        True

    Cost:
        Two forward passes and 3 (or 2) passes over the weights per query, each drawing every direction again;
        state 0 (``sgd``), 1 number (``scalar``), or one or two models.

    Deviates:
        Directions come from streams named by (seed, step, parameter), drawn on the parameters' device in float32,
        instead of one global stream in the parameters' dtype. ``passes=3`` fuses the restore and the update, which the
        published code does in two passes.

    Reference:
        Malladi et al., "Fine-Tuning Language Models with Just Forward Passes", NeurIPS 2023, arXiv:2305.17333,
        Algorithm 1; ``scalar``: arXiv:2605.03869.
    """

    def __init__(
        self,
        params: Any,
        lr: NonNegative,
        eps: Positive = 1e-3,
        variant: Literal["sgd", "momentum", "adam", "lion", "scalar"] = "sgd",
        *,
        sides: Literal[1, 2] = 2,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        adam_eps: Positive = 1e-8,
        bias_correction: bool = True,
        engine: Literal["mutate", "jvp"] = "mutate",
        **shared: Unpack[Unshaped],
    ) -> None:
        check_variant(variant, UPDATE)
        settings = Settings(
            lr=lr,
            eps=eps,
            variant=variant,
            update=UPDATE[variant],
            engine=engine,
            sides=sides,
            betas=betas,
            adam_eps=adam_eps,
            bias_correction=bias_correction,
            **known(MeZO, shared),
        )
        super().__init__(params, settings)
        self._energy = torch.zeros(()) if variant == "scalar" else None

    def _coefficients(self, losses: Tensor) -> Tensor:
        kappas = super()._coefficients(losses)
        if self._energy is None or not bool(torch.isfinite(kappas).all()):
            return kappas
        beta = self.settings.betas[1]
        self._energy = self._energy.to(kappas).lerp(kappas.square().mean(), 1 - beta)
        correction = 1 - beta ** (self.updates + 1) if self.settings.bias_correction else 1.0
        return kappas / ((self._energy / correction).sqrt() + self.settings.adam_eps)

    def _more_state(self) -> dict[str, Any]:
        return {"energy": self._energy}

    def _load_more_state(self, state: dict[str, Any]) -> None:
        self._energy = state["energy"]
