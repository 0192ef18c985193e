"""Baselines that act after the optimiser: they measure each tensor's update, and shorten it.

The update is the difference between the weights after and before the step, so any optimiser will do, at the price of a
copy of the weights. Weight decay is part of the update here, as it is in programs that scale the learning rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from modicum.optim.gradient.entries import agc_factor
from modicum.registry import gradient_rule
from modicum.types import NonNegative, Positive

Update = Float[Tensor, "*shape"]
Factor = Float[Tensor, "*rows"]


@gradient_rule("agc_update", paper="arXiv:2102.06171", laws={"factor_at_most_one", "local"}, acts="after")
def agc_update(update: Update, weight: Update, *, ratio: Positive = 0.01, eps: Positive = 1e-3) -> Factor:
    r"""Clip each row of the update to a share of the norm of that row of the weights.

    .. math:: h_r = \min\Bigl(1, \lambda\frac{\max(\lVert w_r\rVert, \epsilon)}{\lVert u_r\rVert}\Bigr)

    Args:
        update: What the step added to one tensor.
        weight: The tensor before the step.
        ratio: :math:`\lambda`; greater than 0.
        eps: :math:`\epsilon`, least norm that a row is taken to have.

    Returns:
        The factor of each row.

    Example:
        >>> agc_update(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]), ratio=0.5)
        tensor([[0.1000]])

    Cost:
        A copy of the weights.

    Deviates:
        The paper clips gradients; comparisons with AdaGC list the rule as clipping updates.

    Reference:
        Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML 2021,
        arXiv:2102.06171, equation 3.
    """
    return agc_factor(update, weight, ratio=ratio, eps=eps)


@dataclass(frozen=True)
class ClippyState:
    """Sum of squared gradients of one tensor."""

    squares: Float[Tensor, "*shape"]


@gradient_rule(
    "clippy",
    paper="arXiv:2302.09178",
    laws={"factor_at_most_one", "local"},
    acts="after",
    state=ClippyState,
    weight_sized_state="accumulator",
)
def clippy(
    update: Update,
    weight: Update,
    gradient: Update,
    state: ClippyState | None,
    *,
    relative: NonNegative = 0.1,
    absolute: NonNegative = 1e-7,
    accumulator: NonNegative = 0.0,
    initial: Positive = 0.1,
) -> tuple[Factor, ClippyState | None]:
    r"""Shorten the update of a tensor until no entry moves by more than a share of its weight.

    .. math::
        s = \min\Bigl(1, \min_j
        \frac{\lambda_r |w_j| + \lambda_s / \sqrt{\textstyle\sum_t g_{t,j}^2} + \lambda_a}{|u_j|}\Bigr)

    Args:
        update: What the step added to one tensor.
        weight: The tensor before the step.
        gradient: Its gradient.
        state: What the last call returned; ``None`` at the first, and always while ``accumulator`` is 0.
        relative: :math:`\lambda_r`, share of its weight by which an entry may move; 0 or greater.
        absolute: :math:`\lambda_a`, what it may move besides; 0 or greater.
        accumulator: :math:`\lambda_s`; 0 leaves this term, and its memory, out.
        initial: Where the sum of squares starts.

    Returns:
        One factor, and the state.

    Example:
        >>> clippy(torch.tensor([0.2, 0.0]), torch.tensor([1.0, 5.0]), torch.zeros(2), None, absolute=0.0)[0]
        tensor(0.5000)

    Cost:
        A copy of the weights; with ``accumulator`` another.

    Deviates:
        The sum of squares takes gradients before clipping, which is the default of the authors' program.

    Reference:
        Tang et al., "Improving Training Stability for Multitask Ranking Models in Recommender Systems", KDD 2023,
        arXiv:2302.09178, algorithm 2.
    """
    allowed = relative * weight.abs() + absolute
    if accumulator > 0:
        before = torch.full_like(gradient, initial) if state is None else state.squares
        state = ClippyState(before + gradient.square())
        allowed = allowed + accumulator * state.squares.rsqrt()
    ratio = (allowed / update.abs()).where(update != 0, 1).clamp(max=1)
    return (ratio.amin() if ratio.numel() else ratio.new_ones(())), state


@gradient_rule("stable_adamw", paper="arXiv:2304.13013", laws={"factor_at_most_one", "local"}, acts="after")
def stable_adamw(gradient: Update, debiased_second_moment: Update | None, *, eps: Positive = 1e-8) -> Factor:
    r"""Lower the learning rate of a tensor whose gradient its second moment did not foresee.

    .. math:: h = \frac{1}{\max(1, \mathrm{RMS})}, \quad
        \mathrm{RMS}^2 = \operatorname{mean}_j \frac{g_j^2}{\max(\hat v_j, \epsilon^2)}

    Args:
        gradient: The gradient of one tensor.
        debiased_second_moment: :math:`\hat v`, after the step.
        eps: :math:`\epsilon`; greater than 0.

    Returns:
        One factor.

    Example:
        >>> stable_adamw(torch.tensor([2.0, 2.0]), torch.ones(2))
        tensor(0.5000)

    Cost:
        A copy of the weights.

    Deviates:
        Scales the finished update, weight decay included, which is what a lower learning rate does.

    Reference:
        Wortsman et al., "Stable and low-precision training for large-scale vision-language models", NeurIPS 2023,
        arXiv:2304.13013, algorithm 2.
    """
    if debiased_second_moment is None:
        return gradient.new_ones(())
    square = gradient.float().square() / debiased_second_moment.float().clamp(min=eps**2)
    return 1 / square.mean().sqrt().clamp(min=1)


@gradient_rule("adafactor", paper="arXiv:1804.04235", laws={"factor_at_most_one", "local"}, acts="after")
def adafactor(update: Update, lr: float | Tensor, *, limit: Positive = 1.0) -> Factor:
    r"""Clip the root mean square of a tensor's update, measured in units of the learning rate.

    .. math:: h = \min\bigl(1, d\,/\,\mathrm{RMS}(u/\eta)\bigr)

    Args:
        update: What the step added to one tensor.
        lr: The learning rate :math:`\eta`.
        limit: :math:`d`; greater than 0.

    Returns:
        One factor.

    Example:
        >>> adafactor(torch.tensor([0.2, 0.2]), 0.1)
        tensor(0.5000)

    Cost:
        A copy of the weights.

    Deviates:
        The update contains weight decay.

    Reference:
        Shazeer and Stern, "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", ICML 2018,
        arXiv:1804.04235, section 6.
    """
    rms = update.float().square().mean().sqrt()
    return (limit * lr / rms).clamp(max=1).where(rms > 0, 1)


@gradient_rule("trust_ratio", paper="arXiv:1904.00962", laws={"local"}, acts="after")
def trust_ratio(update: Update, weight: Update, lr: float | Tensor) -> Factor:
    r"""Give each tensor's update the length of the tensor, times the learning rate: LARS and LAMB, for reference.

    .. math:: h = \frac{\lVert w\rVert}{\lVert u/\eta\rVert}, \quad h = 1 \text{ where either is } 0

    Args:
        update: What the step added to one tensor.
        weight: The tensor before the step.
        lr: The learning rate :math:`\eta`.

    Returns:
        One factor, which may exceed 1.

    Example:
        >>> trust_ratio(torch.tensor([0.3, 0.4]), torch.tensor([1.0, 0.0]), 0.1)
        tensor(0.2000)

    Cost:
        A copy of the weights.

    Deviates:
        No bounds on the ratio.

    Reference:
        You et al., "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes", ICLR 2020,
        arXiv:1904.00962, algorithm 2.
    """
    length, size = torch.linalg.vector_norm(update.float()), torch.linalg.vector_norm(weight.float())
    return (size * lr / length).where((length > 0) & (size > 0), 1)
