"""AGGC: keep the norm of each kind of module within a band around its moving average.

All query projections are one group, all key projections another, and so on. The band has two sides: small gradients are
raised, large ones lowered, each by at most ten per cent a step. Made for LoRA and for reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.optim.gradient.clipper import PER_UNIT, Nonfinite, NormClipper
from modicum.registry import gradient_rule
from modicum.types import Decay, Fraction, NonNegative, Positive, PositiveInt, UnitInterval

MODULE = r"^(?:.*\.)?([^.]+)\.(?:lora_[AB]\..+|weight|bias)$"  # the module's own name within a parameter's


@dataclass(frozen=True)
class AGGCState:
    """Moving average of each group's scaled norm."""

    average: Float[Tensor, " n"] = field(metadata=PER_UNIT)
    step: int = 0


def aggc_factors(
    norms: Float[Tensor, " n"],
    state: AGGCState | None,
    *,
    steps: PositiveInt,
    decay: Decay = 0.95,
    low: NonNegative = 0.95,
    low_late: NonNegative = 0.98,
    high: Positive = 0.6,
    high_late: Positive = 0.7,
    switch: UnitInterval = 0.4,
    transition: Fraction = 0.3,
    max_up: Positive = 1.1,
    max_down: UnitInterval = 0.9,
    min_norm: NonNegative = 0.01,
) -> tuple[Float[Tensor, " n"], AGGCState]:
    """Return the factor for each group of norm ``norms``, and the state; :class:`AGGC` explains the knobs.

    Example:
        >>> state = AGGCState(torch.tensor([1.0, 1.0]))
        >>> aggc_factors(torch.tensor([0.1, 9.0]), state, steps=10)[0]
        tensor([1.1000, 0.9000])
    """
    if state is None:
        state = AGGCState(torch.zeros_like(norms))
    late = min(1.0, max(0.0, (state.step / steps - switch) / transition))
    upper = (high + (high_late - high) * late) * state.average
    lower = ((low + (low_late - low) * late) * state.average).clamp(min=min_norm)
    down = (upper / norms).clamp(min=max_down)
    up = (lower / norms).clamp(max=max_up)
    factors = torch.ones_like(norms).where((norms >= lower) | (norms == 0), up)
    factors = down.where((norms > upper) & (upper > 0), factors)
    finite = norms.isfinite()
    average = decay * state.average + (1 - decay) * factors * norms
    return factors.where(finite, 0), AGGCState(average.where(finite, state.average), state.step + 1)


@gradient_rule("aggc", paper="arXiv:2601.11864", laws={"permutation"})
class AGGC(NormClipper):
    r"""Scale each group of tensors into a band around the moving average of its norm.

    .. math::
        L = \max(n_{\min}, \alpha_l S), \; U = \alpha_h S, \quad
        h = \begin{cases}\max(U/n, d) & n > U > 0\\ \min(L/n, u) & n < L\\ 1 & \text{else}\end{cases}, \quad
        S \leftarrow \beta S + (1-\beta) h n

    Args:
        params: Pairs of name and parameter; the names make the groups.
        steps: Planned optimiser steps, for the schedule of the band.
        decay: :math:`\beta`, in [0, 1).
        low: :math:`\alpha_l` early in the run; 0 or greater.
        low_late: :math:`\alpha_l` late in the run.
        high: :math:`\alpha_h` early in the run; greater than 0.
        high_late: :math:`\alpha_h` late in the run.
        switch: Share of the run after which the band begins to move, in [0, 1].
        transition: Share of the run in which it moves, in (0, 1].
        max_up: :math:`u`, the largest factor.
        max_down: :math:`d`, the smallest factor, in [0, 1].
        min_norm: :math:`n_{\min}`, the least lower bound.
        groups: Regular expression → replacement for names; by default the name of the module.
        nonfinite: As for AdaGC.

    Raises:
        RecipeError: A knob is out of its range.

    Example:
        >>> model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(2, 2), "k_proj": torch.nn.Linear(2, 2)})
        >>> AGGC(model.named_parameters(), steps=10).units
        ['q_proj', 'k_proj']

    Cost:
        As AdaGC; 4 bytes for each group.

    Deviates:
        The defaults are those of the authors' script, in which ``high`` lies below ``low``: almost every group is
        scaled in every step. All parameters are treated; the authors treat LoRA's.

    Reference:
        Li, Wu, Chang, "AGGC: Adaptive Group Gradient Clipping for Stabilizing Large Language Model Training",
        Findings of ACL 2026, arXiv:2601.11864.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        steps: PositiveInt,
        decay: Decay = 0.95,
        low: NonNegative = 0.95,
        low_late: NonNegative = 0.98,
        high: Positive = 0.6,
        high_late: Positive = 0.7,
        switch: UnitInterval = 0.4,
        transition: Fraction = 0.3,
        max_up: Positive = 1.1,
        max_down: UnitInterval = 0.9,
        min_norm: NonNegative = 0.01,
        groups: Mapping[str, str] | None = None,
        nonfinite: Nonfinite = "zero",
    ) -> None:
        knobs = gradient_rule["aggc"].knobs(
            {
                "steps": steps,
                "decay": decay,
                "low": low,
                "low_late": low_late,
                "high": high,
                "high_late": high_late,
                "switch": switch,
                "transition": transition,
                "max_up": max_up,
                "max_down": max_down,
                "min_norm": min_norm,
                "groups": {MODULE: r"\1"} if groups is None else groups,
                "nonfinite": nonfinite,
            }
        )
        driver = {name: knobs.pop(name) for name in ("nonfinite", "groups")}
        super().__init__(params, aggc_factors, state_type=AGGCState, knobs=knobs, **driver)
