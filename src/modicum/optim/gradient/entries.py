"""Baselines that look at single entries or rows of a gradient: by value, AGC, SPAM and Stable-SPAM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.optim.gradient.tensor_hook import TensorHook
from modicum.registry import gradient_rule
from modicum.types import Decay, NonNegativeInt, Positive, PositiveInt

Gradient = Float[Tensor, "*shape"]


@gradient_rule("value", laws={"local", "permutation"}, acts="before")
def clip_value(gradient: Gradient, *, limit: Positive) -> Gradient:
    r"""Clamp every entry of the gradient.

    .. math:: g_j \leftarrow \max(-c, \min(c, g_j))

    Args:
        gradient: The gradient of one tensor.
        limit: :math:`c`, the largest entry; greater than 0. There is no sensible default.

    Returns:
        The clamped gradient.

    Example:
        >>> clip_value(torch.tensor([-3.0, 0.5]), limit=1.0)
        tensor([-1.0000,  0.5000])

    Cost:
        One read and write of the gradients.

    Reference:
        Mikolov, "Statistical Language Models Based on Neural Networks", PhD thesis, Brno 2012.
    """
    return gradient.clamp(-limit, limit)


def row_norms(tensor: Float[Tensor, "*shape"]) -> Float[Tensor, "*rows"]:
    """Return the norm of each row (first dimension kept), or of the whole when there are no rows.

    Example:
        >>> row_norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
        tensor([[5.],
                [0.]])
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    if tensor.dim() <= 1:
        return torch.linalg.vector_norm(tensor, dtype=dtype)
    return torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.dim())), keepdim=True, dtype=dtype)


@gradient_rule("agc", paper="arXiv:2102.06171", laws={"local", "permutation"}, acts="before")
def agc(gradient: Gradient, weight: Gradient, *, ratio: Positive = 0.01, eps: Positive = 1e-3) -> Gradient:
    r"""Clip each row of a gradient to a share of the norm of that row of the weights.

    .. math:: g_r \leftarrow g_r \min\Bigl(1, \lambda\frac{\max(\lVert w_r\rVert, \epsilon)}{\lVert g_r\rVert}\Bigr)

    Args:
        gradient: The gradient of one tensor.
        weight: The weights it belongs to.
        ratio: :math:`\lambda`; greater than 0.
        eps: :math:`\epsilon`, least norm that a row is taken to have, so that weights at zero can move.

    Returns:
        The clipped gradient.

    Example:
        >>> agc(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), ratio=0.5)
        tensor([[0.3000, 0.4000]])

    Cost:
        One read of the weights, one read and write of the gradients.

    Deviates:
        The final linear layer is treated like any other; leave it out of ``params`` to follow the paper.

    Reference:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021,
        arXiv:2102.06171, equation 3.
    """
    return gradient * agc_factor(gradient, weight, ratio=ratio, eps=eps).to(gradient.dtype)


def agc_factor(gradient: Gradient, weight: Gradient, *, ratio: float, eps: float) -> Float[Tensor, "*rows"]:
    """Return the factor of each row; a row of zeros passes."""
    limit = ratio * row_norms(weight).clamp(min=eps)
    norms = row_norms(gradient)
    return (limit / norms).clamp(max=1).where(norms > 0, 1)


def spam_clip(
    gradient: Gradient,
    second_moment: Gradient | None,
    age: int,
    *,
    threshold: Positive = 5000.0,
    quiet: NonNegativeInt = 20,
) -> Gradient:
    """Clip entries whose square is more than ``threshold`` times Adam's second moment; :class:`SPAM` explains it.

    Example:
        >>> spam_clip(torch.tensor([100.0, 1.0]), torch.tensor([1.0, 1.0]), 30, threshold=4.0)
        tensor([2., 1.])
    """
    if second_moment is None or age < quiet:
        return gradient
    limit = (threshold * second_moment).sqrt()
    return torch.where((gradient.abs() > limit) & (second_moment > 0), gradient.sign() * limit, gradient)


@gradient_rule("spam", paper="arXiv:2501.06842", laws={"local", "permutation"})
class SPAM(TensorHook):
    r"""Clip entries that spike against Adam's second moment, and forget the moments now and then.

    .. math:: g_j^2 > \theta v_j \;\Rightarrow\; g_j \leftarrow \operatorname{sign}(g_j)\sqrt{\theta v_j}

    Args:
        params: Parameters, or pairs of name and parameter.
        threshold: :math:`\theta`; greater than 0.
        quiet: Steps after each reset in which nothing is clipped, because the moment is not settled.
        period: Steps between resets of Adam's moments.
        rewarm: Steps after a reset in which the learning rate rises again along a cosine.

    Raises:
        UnsupportedError: The optimiser keeps no second moment, or parameters are sharded.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = SPAM(model.parameters()).attach(torch.optim.AdamW(model.parameters()))

    Cost:
        Two reads and one write of the gradients, one read of the moments.

    Deviates:
        Adam's count of steps is reset with its moments, so that their bias is corrected again.

    Reference:
        Huang et al., "SPAM: Spike-Aware Adam with Momentum Reset for Stable LLM Training", ICLR 2025,
        arXiv:2501.06842.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        threshold: Positive = 5000.0,
        quiet: NonNegativeInt = 20,
        period: PositiveInt = 500,
        rewarm: NonNegativeInt = 150,
    ) -> None:
        given = {"threshold": threshold, "quiet": quiet, "period": period, "rewarm": rewarm}
        knobs = gradient_rule["spam"].knobs(given)
        driver = {name: knobs.pop(name) for name in ("period", "rewarm")}
        super().__init__(params, spam_clip, acts="before", knobs=knobs, **driver)


@dataclass(frozen=True)
class StableSPAMState:
    """Moving averages of one tensor's largest entry, norm and squared norm."""

    largest: Float[Tensor, ""]
    norm: Float[Tensor, ""]
    square: Float[Tensor, ""]
    step: int = 0


def stable_spam_clip(
    gradient: Gradient,
    state: StableSPAMState | None,
    *,
    norm_decay: Decay = 0.7,
    square_decay: Decay = 0.9,
    largest_decay: Decay = 0.999,
    eps: Positive = 1e-8,
) -> tuple[Gradient, StableSPAMState]:
    """Clip the largest entries, then normalise the gradient to its history; :class:`StableSPAM` explains it.

    Example:
        >>> gradient, state = stable_spam_clip(torch.tensor([3.0, 4.0]), None)
        >>> gradient, state.step
        (tensor([0.6000, 0.8000]), 1)
    """
    work = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if state is None:
        zero = work.new_zeros(())
        state = StableSPAMState(zero, zero, zero)
    step = state.step + 1
    top = work.abs().amax() if work.numel() else work.new_zeros(())
    largest = largest_decay * state.largest + (1 - largest_decay) * top
    limit = largest / (1 - largest_decay**step)
    work = torch.where(work.abs() > limit, work / top * limit, work)
    length = torch.linalg.vector_norm(work)
    norm = norm_decay * state.norm + (1 - norm_decay) * length
    square = square_decay * state.square + (1 - square_decay) * length.square()
    scale = (norm / (1 - norm_decay**step)) / ((square / (1 - square_decay**step)).sqrt() + eps)
    work = (work / length * scale).where(length > 0, 0)
    return work.to(gradient.dtype), StableSPAMState(largest, norm, square, step)


@gradient_rule("stable_spam", paper="arXiv:2502.17055", laws={"local", "permutation"})
class StableSPAM(TensorHook):
    r"""Clip the largest entries of each gradient to their history, then give it a norm near one.

    .. math::
        |g_j| > \hat m_{\max} \Rightarrow g_j \leftarrow \tfrac{g_j}{\max|g|}\hat m_{\max}, \quad
        g \leftarrow \frac{g}{\lVert g\rVert}\cdot\frac{\hat m}{\sqrt{\hat v} + \epsilon}

    where :math:`\hat m_{\max}, \hat m, \hat v` are moving averages, free of bias, of the largest entry, the norm and
    its square.

    Args:
        params: Parameters, or pairs of name and parameter.
        norm_decay: Memory of the norm, in [0, 1).
        square_decay: Memory of its square, in [0, 1).
        largest_decay: Memory of the largest entry, in [0, 1).
        eps: :math:`\epsilon`; greater than 0.
        period: Steps between resets of Adam's moments.

    Raises:
        UnsupportedError: Parameters are sharded.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> clipper = StableSPAM(model.parameters()).attach(torch.optim.AdamW(model.parameters()))

    Cost:
        Four reads and two writes of the gradients; three numbers for each tensor.

    Deviates:
        The three averages are not reset with Adam's moments. A gradient of zeros stays zero.

    Reference:
        Huang et al., "Stable-SPAM: How to Train in 4-Bit More Stably than 16-Bit Adam", 2025, arXiv:2502.17055.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        norm_decay: Decay = 0.7,
        square_decay: Decay = 0.9,
        largest_decay: Decay = 0.999,
        eps: Positive = 1e-8,
        period: PositiveInt = 1000,
    ) -> None:
        knobs = gradient_rule["stable_spam"].knobs(
            {
                "norm_decay": norm_decay,
                "square_decay": square_decay,
                "largest_decay": largest_decay,
                "eps": eps,
                "period": period,
            }
        )
        period = knobs.pop("period")
        super().__init__(
            params, stable_spam_clip, acts="before", state_type=StableSPAMState, knobs=knobs, period=period
        )
