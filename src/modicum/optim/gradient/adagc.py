"""AdaGC: clip each tensor's gradient against a moving average of its own clipped norms.

A fixed global threshold stops binding as gradients shrink, and lets one bad tensor scale all others down. AdaGC keeps
one number for each tensor and clips before the gradient enters any moment of the optimiser, so it works with all of
them.
Four facts to know before you use it, all measured in the study that the guide shows:

* It clips *most* of the time at ``relative=1.04``: close to normalising each tensor to a slowly moving scale.
* The scale may grow by 0.04 % a step, and fall by 1 %.
* The published start (``init="min"``) lets one zero gradient freeze a tensor for ever, as happens with LoRA, whose
  second factor starts at zero. Zeros are therefore ignored here unless ``ignore_zero=False``.
* ``init="min"`` costs loss in runs of a few thousand steps. The default is ``"ema"``.

Suggested: the defaults for pre-training; ``relative`` of 1.5 to 2 for fine-tuning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from modicum.optim.gradient.clipper import PER_UNIT, Granularity, Nonfinite, NormClipper
from modicum.registry import gradient_rule
from modicum.types import Decay, NonNegative, NonNegativeInt, Positive, PositiveOrInfinite

Init: TypeAlias = Literal["min", "mean", "ema", "last"]


@dataclass(frozen=True)
class AdaGCState:
    """Memory of :func:`adagc_factors`."""

    gamma: Float[Tensor, " n"] = field(metadata=PER_UNIT)  # the moving average; NaN where nothing has been observed yet
    count: Int[Tensor, " n"] | None = field(
        default=None, metadata=PER_UNIT
    )  # observations, while a mean is being taken
    step: int = 0


def adagc_factors(
    norms: Float[Tensor, " n"],
    state: AdaGCState | None,
    total: Float[Tensor, ""] | None = None,
    *,
    relative: Positive = 1.04,
    absolute: Positive = 1.0,
    beta: Decay = 0.99,
    warmup: NonNegativeInt = 100,
    init: Init = "ema",
    eps: NonNegative = 1e-8,
    init_beta: Decay = 0.9,
    observe: Literal["clipped", "raw"] = "clipped",
    ignore_zero: bool = True,
) -> tuple[Float[Tensor, " n"], AdaGCState]:
    r"""Return the factor for each gradient of norm ``norms``, and the state after this step.

    Pure: nothing is changed, drawn or read back from the device. A norm that is not finite gets the factor 0 and leaves
    no trace in the state. ``state`` is ``None`` at the first call; ``total`` is the norm of all gradients together, for
    callers whose ``norms`` are only a part of them. :class:`AdaGC` explains the mathematics and the knobs.

    Example:
        >>> state = AdaGCState(gamma=torch.ones(1), step=100)
        >>> factors, state = adagc_factors(torch.tensor([10.0]), state, eps=0)
        >>> factors, state.gamma
        (tensor([0.1040]), tensor([1.0004]))
    """
    if state is None:
        count = torch.zeros(norms.shape, dtype=torch.int32, device=norms.device) if init == "mean" and warmup else None
        state = AdaGCState(torch.full_like(norms, math.nan), count)
    gamma, count, finite = state.gamma, state.count, norms.isfinite()
    seen = ~gamma.isnan()
    observed = finite & (norms > 0) if ignore_zero else finite
    if state.step < warmup:
        if total is None:
            total = torch.linalg.vector_norm(norms.where(finite, 0))
        factor = (absolute / (total + eps)).clamp(max=1)
        factors = factor.expand_as(norms)
        seen_now = norms * factor if observe == "clipped" else norms
        candidate = _started(gamma, seen_now, count, init=init, init_beta=init_beta)
        first = seen_now
    else:
        # With an infinite factor a threshold of zero would become NaN, and nothing is to be clipped.
        threshold = relative * gamma if relative < math.inf else torch.full_like(gamma, math.inf)
        factors = (threshold / (norms + eps)).clamp(max=1).where(seen & (norms > 0), 1)
        # The average takes the threshold itself, not the clipped norm with its eps.
        candidate = beta * gamma + (1 - beta) * norms.minimum(threshold)
        first = norms
    gamma = candidate.where(seen, first).where(observed, gamma)
    if count is not None:
        count = count + observed.to(count.dtype) if state.step + 1 < warmup else None
    return factors.where(finite, 0), AdaGCState(gamma, count, state.step + 1)


def _started(gamma: Tensor, norms: Tensor, count: Tensor | None, *, init: Init, init_beta: float) -> Tensor:
    """Return the estimate after one more observation of the warm-up."""
    if init == "min":
        return gamma.minimum(norms)
    if init == "ema":
        return init_beta * gamma + (1 - init_beta) * norms
    if count is not None:
        return gamma + (norms - gamma) / (count + 1)
    return norms


def adagc_advice(knobs: Mapping[str, Any], *, steps: int) -> list[str]:
    """Return what a user should know who trains for ``steps`` steps with these knobs.

    Example:
        >>> adagc_advice({"init": "min"}, steps=1000)[0][:42]
        "init='min' costs loss in runs this short ("
    """
    found = []
    if knobs.get("init") == "min" and 0 < steps < 5000:
        found.append(f"init='min' costs loss in runs this short ({steps} steps). Use init: ema, or mean.")
    if 0 < steps <= knobs.get("warmup", 0):
        found.append(f"The run ends within the warm-up of {knobs['warmup']} steps, so only global clipping happens.")
    return found


@gradient_rule(
    "adagc",
    paper="arXiv:2502.11034",
    laws={"factor_at_most_one", "local", "scale", "permutation"},
    advice=adagc_advice,
)
class AdaGC(NormClipper):
    r"""Clip each gradient to a multiple of the moving average of its own clipped norms.

    .. math::
        h_i = \min\Bigl(1, \frac{\lambda\,\gamma_i}{\lVert g_i\rVert + \epsilon}\Bigr), \quad
        g_i \leftarrow h_i\,g_i, \quad
        \gamma_i \leftarrow \beta\,\gamma_i + (1-\beta)\min(\lVert g_i\rVert, \lambda\,\gamma_i)

    During the warm-up all gradients are clipped together to the norm ``absolute``, and :math:`\gamma_i` is estimated
    from what is left.

    Args:
        params: Parameters, or pairs of name and parameter: names make the state independent of the order.
        relative: :math:`\lambda`, how far above its average a norm may be; greater than 0. Below 1 the scale can only
            fall. ``inf`` clips nothing.
        absolute: Global norm to which gradients are clipped during the warm-up; greater than 0.
        beta: :math:`\beta`, memory of the average, in [0, 1).
        warmup: Steps of global clipping. With 0, the first gradient of each tensor passes and sets its scale.
        init: How the warm-up estimates :math:`\gamma`: ``min`` as published, ``mean``, ``ema`` or ``last``.
        eps: Added to norms in denominators; 0 or greater.
        init_beta: Memory of ``init="ema"``, in [0, 1).
        observe: Whether the warm-up looks at norms after global clipping (``clipped``) or before it (``raw``).
        ignore_zero: Do not count gradients that are exactly zero. ``False`` is the literal rule, under which a tensor
            with one zero gradient in the warm-up may never move again.
        nonfinite: ``zero`` erases a gradient that is not finite, ``skip`` passes it on, ``raise`` stops (this one reads
            the norms back in every step).
        granularity: ``tensor``; ``shard`` lets each rank clip its own part, without communication after the warm-up but
            with a direction that depends on the sharding; ``global`` keeps one average for all.
        groups: Regular expression → replacement for names; tensors that get the same name share one average.
            ``{"[qkv]_proj": "qkv_proj"}`` makes three projections behave as the fused matrix does.

    Raises:
        RecipeError: A knob is out of its range.
        UnsupportedError: There are no parameters, or a gradient is sparse or complex.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> clipper = AdaGC(model.named_parameters()).attach(optimizer)
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> sorted(clipper.state_dict())
        ['gamma.bias', 'gamma.weight', 'step']

    Cost:
        One read of the gradients, one write of those that are clipped; 4 bytes for each tensor. One all-reduce of a
        vector for each way of sharding; no synchronisation with the host.

    Deviates:
        ``init`` is ``ema`` and zeros are ignored, where the paper takes the minimum of all norms; ``init="min",
        ignore_zero=False`` is the published rule. The official programs differ on the norm that the warm-up observes
        and on its length; this follows the PyTorch one (``clipped``, exactly ``warmup`` steps). Gradients that are not
        finite are erased and leave the average alone, which the paper does not treat.

    Reference:
        Wang et al., "Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping", ICML 2026, arXiv:2502.11034.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        relative: PositiveOrInfinite = 1.04,
        absolute: Positive = 1.0,
        beta: Decay = 0.99,
        warmup: NonNegativeInt = 100,
        init: Init = "ema",
        eps: NonNegative = 1e-8,
        init_beta: Decay = 0.9,
        observe: Literal["clipped", "raw"] = "clipped",
        ignore_zero: bool = True,
        nonfinite: Nonfinite = "zero",
        granularity: Granularity = "tensor",
        groups: Mapping[str, str] | None = None,
    ) -> None:
        knobs = gradient_rule["adagc"].knobs(
            {
                "relative": relative,
                "absolute": absolute,
                "beta": beta,
                "warmup": warmup,
                "init": init,
                "eps": eps,
                "init_beta": init_beta,
                "observe": observe,
                "ignore_zero": ignore_zero,
                "nonfinite": nonfinite,
                "granularity": granularity,
                "groups": groups,
            }
        )
        if knobs["relative"] < 1:
            warnings.warn(
                f"relative={relative} is below 1: thresholds can only fall, and training will stall. Use 1.04 or more.",
                stacklevel=3,
            )
        driver = {name: knobs.pop(name) for name in ("nonfinite", "granularity", "groups")}
        super().__init__(params, adagc_factors, state_type=AdaGCState, knobs=knobs, **driver)

    @property
    def warming_up(self) -> bool:
        """Whether the next step still clips by the global norm."""
        return (self.state.step if self.state else 0) < self.knobs["warmup"]

    def thresholds(self) -> Tensor | None:
        """Return the norm above which each unit is clipped next; ``None`` during the warm-up."""
        return None if self.state is None or self.warming_up else self.knobs["relative"] * self.state.gamma
