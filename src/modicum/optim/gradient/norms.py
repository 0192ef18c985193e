"""Baselines that look at norms: fixed thresholds, percentiles, z-scores and skipping.

They share ``NormClipper`` with AdaGC, so a comparison changes one name. All but ``fixed_norm`` give every tensor the
same factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from annotated_types import Ge, Le
from jaxtyping import Float
from torch import Tensor

from modicum.registry import gradient_rule
from modicum.types import Decay, Positive, PositiveInt, PositiveOrInfinite

Norms = Float[Tensor, " n"]
EPS = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to a norm before it divides


@gradient_rule("global_norm", laws={"factor_at_most_one", "permutation"})
def global_norm(norms: Norms, state: None, *, limit: Positive = 1.0) -> tuple[Norms, None]:
    r"""Clip all gradients together to a fixed global norm: what every trainer does.

    .. math:: h = \min\bigl(1, c / (G + 10^{-6})\bigr), \quad G^2 = \textstyle\sum_i \lVert g_i\rVert^2

    Args:
        norms: Norm of each gradient.
        state: None.
        limit: :math:`c`, the largest global norm; greater than 0.

    Returns:
        The factor of each gradient, and no state.

    Example:
        >>> global_norm(torch.tensor([3.0, 4.0]), None)[0]
        tensor([0.2000, 0.2000])

    Cost:
        As ``torch.nn.utils.clip_grad_norm_``.

    Deviates:
        Gradients that are not finite are erased and not counted; torch makes all others NaN.

    Reference:
        Pascanu et al., "On the difficulty of training recurrent neural networks", ICML 2013, arXiv:1211.5063.
    """
    return _common(norms, (limit / (_total(norms) + EPS)).clamp(max=1)), state


@gradient_rule("fixed_norm", laws={"factor_at_most_one", "local", "permutation"})
def fixed_norm(norms: Norms, state: None, *, limit: Positive) -> tuple[Norms, None]:
    r"""Clip each gradient alone to one fixed norm: AdaGC without its adaptivity, for ablations.

    .. math:: h_i = \min\bigl(1, c / (\lVert g_i\rVert + 10^{-6})\bigr)

    Args:
        norms: Norm of each gradient.
        state: None.
        limit: :math:`c`, the largest norm of a tensor; greater than 0.

    Returns:
        The factor of each gradient, and no state.

    Example:
        >>> fixed_norm(torch.tensor([3.0, 0.5]), None, limit=1.0)[0]
        tensor([0.3333, 1.0000])

    Cost:
        As ``torch.nn.utils.clip_grad_norm_``.

    Deviates:
        One limit for all tensors; the ablation it stands for has no published form.

    Reference:
        The control that reviews of AdaGC asked for; https://openreview.net/forum?id=uBYlCu8b8Z.
    """
    return (limit / (norms + EPS)).clamp(max=1).where(norms.isfinite(), 0), state


@dataclass(frozen=True)
class History:
    """Global norms seen so far."""

    norms: Float[Tensor, " t"]


@gradient_rule("autoclip", paper="arXiv:2007.14469", laws={"factor_at_most_one", "permutation", "scale"}, state=History)
def autoclip(
    norms: Norms, state: History | None, *, percentile: Annotated[float, Ge(0), Le(100)] = 10.0
) -> tuple[Norms, History]:
    r"""Clip the global norm to a percentile of all norms so far.

    .. math:: h = \min\bigl(1, Q_p(G_1, \dots, G_t) / (G_t + 10^{-6})\bigr)

    Args:
        norms: Norm of each gradient.
        state: What the last call returned; ``None`` at the first.
        percentile: :math:`p`, in [0, 100]; the present norm counts.

    Returns:
        The factor of each gradient, and the history.

    Example:
        >>> factors, state = autoclip(torch.tensor([2.0]), History(torch.tensor([1.0])), percentile=0)
        >>> factors
        tensor([0.5000])

    Cost:
        Sorting the history; 4 bytes a step.

    Deviates:
        A step whose gradients are all missing or not finite enters as 0.

    Reference:
        Seetharaman et al., "AutoClip: Adaptive Gradient Clipping for Source Separation Networks", MLSP 2020,
        arXiv:2007.14469.
    """
    total = _total(norms)
    history = total.view(1) if state is None else torch.cat([state.norms, total.view(1)])
    limit = history.quantile(percentile / 100)
    return _common(norms, (limit / (total + EPS)).clamp(max=1)), History(history)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of the global norm; during the warm-up ``variance`` is the sum of squared deviations."""

    mean: Float[Tensor, ""]
    variance: Float[Tensor, ""]
    step: int = 0


@gradient_rule("zclip", paper="arXiv:2504.02507", laws={"factor_at_most_one", "permutation"}, state=Moments)
def zclip(
    norms: Norms,
    state: Moments | None,
    *,
    z: Positive = 2.5,
    decay: Decay = 0.97,
    warmup: PositiveInt = 25,
    limit: PositiveOrInfinite = 1.0,
    eps: Positive = 1e-6,
) -> tuple[Norms, Moments]:
    r"""Clip the global norm when it lies too many standard deviations above its moving mean.

    .. math::
        \zeta = \frac{G - \mu}{\sigma + \epsilon}, \quad
        G' = \begin{cases}\mu + z\,\sigma\,z/\zeta & \zeta > z\\ G & \text{else}\end{cases}, \quad
        h = \begin{cases}\min(G', c) / (G + 10^{-6}) & \min(G', c) < G\\ 1 & \text{else}\end{cases}

    Args:
        norms: Norm of each gradient.
        state: What the last call returned; ``None`` at the first.
        z: Largest z-score that passes; greater than 0.
        decay: Memory of mean and variance, in [0, 1).
        warmup: Steps whose plain mean and variance start the averages; only ``limit`` holds meanwhile.
        limit: :math:`c`, a largest global norm that always holds; ``inf`` for none.
        eps: :math:`\epsilon`; greater than 0.

    Returns:
        The factor of each gradient, and the moments, which :math:`G'` enters.

    Example:
        >>> state = Moments(torch.tensor(1.0), torch.tensor(0.01), step=25)
        >>> zclip(torch.tensor([2.0]), state, limit=9.0)[0]
        tensor([0.5313])

    Cost:
        As ``torch.nn.utils.clip_grad_norm_``; two numbers of state.

    Deviates:
        The mean moves before the variance uses it, as in the authors' program.

    Reference:
        Kumar et al., "ZClip: Adaptive Spike Mitigation for LLM Pre-Training", 2025, arXiv:2504.02507.
    """
    total = _total(norms)
    if state is None:
        state = Moments(torch.zeros_like(total), torch.zeros_like(total))
    mean, variance, step = state.mean, state.variance, state.step + 1
    if step <= warmup:
        target, shift = total, total - mean
        mean = mean + shift / step
        variance = variance + shift * (total - mean)
        if step == warmup:
            variance = variance / warmup
    else:
        deviation = variance.sqrt()
        score = (total - mean) / (deviation + eps)
        target = (mean + z * deviation * z / score).where(score > z, total)
        mean = decay * mean + (1 - decay) * target
        variance = decay * variance + (1 - decay) * (target - mean).square()
    target = target.clamp(max=limit)
    # A norm that passes is left as it is, not divided by itself plus epsilon.
    factor = (target / (total + EPS)).where(target < total, 1)
    return _common(norms, factor), Moments(mean, variance, step)


@gradient_rule("skip_step", laws={"factor_at_most_one", "permutation", "scale"}, state=History)
def skip_step(
    norms: Norms,
    state: History | None,
    *,
    sigma: Positive = 6.0,
    window: PositiveInt = 128,
    minimum: Annotated[int, Ge(2)] = 64,
) -> tuple[Norms, History]:
    r"""Erase all gradients of a step whose global norm stands out of the last ones.

    .. math:: h = \mathbb 1\bigl[G_t \le \mu + \sigma s\bigr], \quad
        \mu, s = \text{mean and standard deviation of } G_{t-w}, \dots, G_{t-1}

    Args:
        norms: Norm of each gradient.
        state: What the last call returned; ``None`` at the first.
        sigma: Standard deviations that pass; greater than 0.
        window: :math:`w`, steps to compare with.
        minimum: Steps to see before anything is skipped; at least 2.

    Returns:
        The factor of each gradient, 0 or 1, and the window.

    Example:
        >>> quiet = History(torch.tensor([1.0, 1.1, 0.9]))
        >>> skip_step(torch.tensor([30.0]), quiet, minimum=2)[0]
        tensor([0.])

    Cost:
        As measuring the norm; ``window`` numbers of state.

    Deviates:
        The original watches the loss as well, and holds back the optimiser's moments; here they see zero gradients,
        so momentum still moves the weights.

    Reference:
        OLMo team, "2 OLMo 2 Furious", 2025, arXiv:2501.00656; SkipStepOptimizer of OLMo-core.
    """
    total = _total(norms)
    past = total.new_zeros(0) if state is None else state.norms
    factor = torch.ones_like(total)
    if past.numel() >= minimum:
        factor = (total <= past.mean() + sigma * past.std()).to(total.dtype)
    return _common(norms, factor), History(torch.cat([past, total.view(1)])[-window:])


def _total(norms: Norms) -> Float[Tensor, ""]:
    """Return the norm of all gradients that are finite."""
    return torch.linalg.vector_norm(norms.where(norms.isfinite(), 0))


def _common(norms: Norms, factor: Float[Tensor, ""]) -> Norms:
    """Give every gradient one factor, and those that are not finite zero."""
    return factor.expand_as(norms).where(norms.isfinite(), 0)
