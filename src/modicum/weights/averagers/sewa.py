"""SeWA: which K of the checkpoints to average, learnt as a random mask by gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.registry import averager
from modicum.types import Positive, PositiveInt
from modicum.weights.averagers.support import check_k, mean_of, some_of
from modicum.weights.kernels.masks import (
    Mask,
    exact_mask,
    gumbel,
    independent_mask,
    log_order_slope,
    logistic,
    mean_slope,
    project_capped,
)
from modicum.weights.search import Landscape

Estimator: TypeAlias = Literal["exact_k", "bernoulli", "soft", "reinforce", "published"]
Start: TypeAlias = Literal["prior", "stride", "random"]


def work(
    n: int, batches: int, *, k: int | str, estimator: str, iters: int, samples: int | None, refine: bool, **_: Any
) -> tuple[int, int, int]:
    """Return the passes with gradient, and those without: of one round of exchanges, and of three."""
    size = k if isinstance(k, int) else some_of(n)
    if size == n:
        return 0, 0, 0
    curve, swaps = n if k == "auto" else 0, 1 + size * (n - size) if refine else 0
    least, most, asked = batches * (curve + swaps), batches * (curve + 3 * swaps), iters * drawn_in(estimator, samples)
    return (0, least + asked, most + asked) if estimator == "reinforce" else (asked, least, most)


def drawn_in(estimator: str, samples: int | None) -> int:
    """Return how many masks a step draws: of ``reinforce``, which compares them, 4 where nothing is said."""
    return samples or (4 if estimator == "reinforce" else 1)


@averager("sewa", learns="gradient", paper="arXiv:2502.10119", supplied={"report"}, work=work)
def sewa(
    landscape: Landscape,
    checkpoints: Sequence[object],
    *,
    k: PositiveInt | Literal["auto"] = "auto",
    estimator: Estimator = "exact_k",
    iters: PositiveInt = 150,
    lr: Positive = 0.05,
    samples: PositiveInt | None = None,
    tau: Positive = 1.0,
    tau_final: Positive | None = None,
    start: Start = "prior",
    project: bool = False,
    refine: bool = True,
    rng: torch.Generator,
    report: list[dict[str, Any]] | None = None,
) -> list[float]:
    r"""Learn a logit for each checkpoint by gradients of the loss of masked means; average the K largest equally.

    .. math::
        z = l + \mathrm{Gumbel}, \quad h_i = [z_i > \vartheta], \quad y_i = \sigma((z_i - \vartheta)/\tau), \qquad
        \frac{\partial F}{\partial l_i} = \frac{c_i - \sum_j w_j c_j}{\sum_j h_j} \cdot \frac{y_i (1 - y_i)}{\tau}

    with the threshold :math:`\vartheta` half-way between the K-th and the next noisy logit, :math:`w = h / \sum h` and
    :math:`c_i = \langle \nabla F(\bar\theta), \theta_i \rangle`.

    Args:
        landscape: The loss along the checkpoints.
        checkpoints: Oldest first.
        k: How many (K). ``auto`` searches with ``min(5, ceil(n / 2))``, evaluates the means of the 1, 2, …, n
            checkpoints of largest logit on all batches, and takes the best number.
        estimator: ``exact_k`` draws masks of exactly K; ``bernoulli`` draws each checkpoint alone, by logistic noise;
            ``soft`` averages by the soft mask; ``reinforce`` needs values of the loss only; ``published`` is the form
            of related code (one Gumbel variable, division by K, weight decay), a negative control.
        iters: Steps; each sees one batch.
        lr: Rate of Adam on the logits.
        samples: Masks drawn in a step; 1 when not given, 4 for ``reinforce``, which compares them and needs 2 at least.
        tau: Temperature of the soft mask.
        tau_final: Temperature at the end, reached exponentially; ``tau`` throughout when not given.
        start: Logits at the beginning: ``prior`` are the estimator's own (zero, K/n for ``bernoulli``, ``stride`` for
            ``published``), ``stride`` raises every (n // K)-th a little, ``random`` raises a random K/2 of them.
        project: For independent masks: project the probabilities onto sums of at most K after every step.
        refine: Afterwards exchange one chosen for one other checkpoint while that lowers the loss on all batches.
        rng: Of the recipe's seed.
        report: Gets logits, losses of the search, exchanges and, for ``auto``, the curve over K.

    Returns:
        The coefficients.

    Raises:
        RecipeError: There are fewer checkpoints than ``k``, or ``reinforce`` has one sample.

    Example:
        >>> known = [{"w": torch.tensor([x])} for x in (0.0, 1.0, 2.0, 10.0)]
        >>> landscape = Landscape(lambda weights, t: (weights["w"] - t).square().sum(), known, [1.5])
        >>> sewa(landscape, known, k=2, rng=torch.Generator().manual_seed(0))
        [0.0, 0.5, 0.5, 0.0]

    Cost:
        ``iters`` times ``samples`` forward and backward passes, each with one mean and n inner products of the weights'
        size; n values on all batches for ``auto``, and K(n - K) for each round of exchanges.

    Deviates:
        The text of the paper could not be consulted in full; frame and relaxation are as it and its reviews describe
        them, numbers are choices made here. The default estimator draws exactly K; the paper's independent masks are
        ``bernoulli``. The number K need not be fixed, exchanges follow the search, and related code does neither.

    Reference:
        Wang et al., "SeWA: Selective Weight Average via Probabilistic Masking", 2025, arXiv:2502.10119, Section 3.
    """
    n = len(checkpoints)
    if isinstance(k, int):
        check_k("sewa", k, n)
    drawn = drawn_in(estimator, samples)
    if estimator == "reinforce" and drawn < 2:
        raise RecipeError("sewa: reinforce compares the masks of a step, and samples is 1. Set samples to 2 or more.")
    size = k if isinstance(k, int) else some_of(n)
    if size == n:
        return mean_of(range(n), n)
    logits = _start(n, size, estimator, start, rng)
    settings = _Settings(landscape, size, rng, drawn, tau, tau_final or tau, project and estimator != "exact_k")
    losses = _search(logits, settings, estimator, iters, lr)
    order = sorted(range(n), key=lambda i: (-float(logits[i]), -i))
    chosen, swaps = set(order[:size]), list[dict[str, Any]]()
    if refine:
        swaps += _exchange(chosen, order, landscape)
        order.sort(key=lambda i: i not in chosen)
    curve = []
    if k == "auto":
        curve = [landscape.value(mean_of(order[:count], n)) for count in range(1, n + 1)]
        chosen = set(order[: 1 + min(range(n), key=lambda count: curve[count])])
        if refine and len(chosen) < n:
            swaps += _exchange(chosen, order, landscape)
    if report is not None:
        report.append({"logits": logits.tolist(), "losses": losses, "swaps": swaps, "curve": curve, "order": order})
    return mean_of(chosen, n)


class _Settings(NamedTuple):
    landscape: Landscape
    k: int
    rng: torch.Generator
    samples: int
    tau: float
    tau_final: float
    project: bool


def _start(n: int, k: int, estimator: Estimator, start: Start, rng: torch.Generator) -> Tensor:
    if start == "random":
        logits = torch.full((n,), -0.5, dtype=torch.float64)
        logits[torch.randperm(n, generator=rng)[: max(1, k // 2)]] = 1
        return logits
    logits = torch.zeros(n, dtype=torch.float64)
    if start == "stride" or estimator == "published":
        logits[:: n // k] = 1e-3
    elif estimator == "bernoulli":
        logits += math.log(k / (n - k))
    return logits


def _search(logits: Tensor, at: _Settings, estimator: Estimator, iters: int, lr: float) -> list[float]:
    """Move the logits in place; return the mean loss of each step's masks."""
    if estimator == "published":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([logits], lr=lr, weight_decay=0.01)
    else:
        optimizer = torch.optim.Adam([logits], lr=lr)
    sample: Callable[..., tuple[float, Tensor]] = {
        "exact_k": _exact, "bernoulli": _independent, "soft": _soft, "published": _published
    }.get(estimator, _exact)  # fmt: skip
    losses = []
    for step in range(iters):
        tau = at.tau * (at.tau_final / at.tau) ** (step / max(1, iters - 1))
        if estimator == "reinforce":
            loss, logits.grad = _reinforce(logits, at, step)
        else:
            found = [sample(logits, at, tau, step) for _ in range(at.samples)]
            loss = math.fsum(loss for loss, _ in found) / at.samples
            logits.grad = torch.stack([slope for _, slope in found]).mean(0)
        optimizer.step()
        if at.project:
            shares = project_capped(logits.sigmoid(), at.k).clamp(1e-6, 1 - 1e-6)
            logits.copy_(shares.logit())
        losses.append(loss)
    return losses


def _exact(logits: Tensor, at: _Settings, tau: float, step: int) -> tuple[float, Tensor]:
    mask = exact_mask(logits, gumbel(len(logits), at.rng), k=at.k, tau=tau)
    return _mean_loss(mask.hard, mask, at, step)


def _soft(logits: Tensor, at: _Settings, tau: float, step: int) -> tuple[float, Tensor]:
    mask = exact_mask(logits, gumbel(len(logits), at.rng), k=at.k, tau=tau)
    return _mean_loss(mask.soft, mask, at, step)


def _independent(logits: Tensor, at: _Settings, tau: float, step: int) -> tuple[float, Tensor]:
    while True:
        mask = independent_mask(logits, logistic(len(logits), at.rng), tau=tau)
        if bool(mask.hard.any()):  # of no checkpoint there is no mean
            return _mean_loss(mask.hard, mask, at, step)


def _mean_loss(m: Tensor, mask: Mask, at: _Settings, step: int) -> tuple[float, Tensor]:
    loss, c = at.landscape.gradient((m / m.sum()).tolist(), step)
    return loss, mean_slope(m, c) * mask.slope


def _published(logits: Tensor, at: _Settings, tau: float, step: int) -> tuple[float, Tensor]:
    """One Gumbel variable, so that a logit of 0 is chosen with probability 0.63, and a sum divided by K."""
    while True:
        mask = independent_mask(logits, gumbel(len(logits), at.rng), tau=tau)
        if bool(mask.hard.any()):
            loss, c = at.landscape.gradient((mask.hard / at.k).tolist(), step)
            return loss, c / at.k * mask.slope


def _reinforce(logits: Tensor, at: _Settings, step: int) -> tuple[float, Tensor]:
    """Return the mean loss and the estimate of its slope, each sample beside the mean of the others."""
    n = len(logits)
    orders = [(logits + gumbel(n, at.rng)).argsort(descending=True)[: at.k] for _ in range(at.samples)]
    losses = torch.tensor(
        [at.landscape.value(mean_of(order.tolist(), n), step) for order in orders], dtype=torch.float64
    )
    return float(losses.mean()), reinforce_slope(logits, orders, losses)


def reinforce_slope(logits: Tensor, orders: Sequence[Tensor], losses: Tensor) -> Tensor:
    """Return the estimate of the slope of the expected loss from drawn orders and their losses."""
    others = (losses.sum() - losses) / (len(losses) - 1)
    slopes = torch.stack([log_order_slope(logits, order) for order in orders])
    return ((losses - others)[:, None] * slopes).mean(0)


def _exchange(chosen: set[int], order: Sequence[int], landscape: Landscape) -> list[dict[str, Any]]:
    """Exchange one chosen for one other while the loss on all batches falls, in place; return what was done."""
    n, done = len(order), list[dict[str, Any]]()
    now, moved = landscape.value(mean_of(chosen, n)), True
    while moved:
        moved = False
        for out in sorted(chosen, key=order.index, reverse=True):
            for into in [i for i in order if i not in chosen]:
                tried = landscape.value(mean_of(chosen - {out} | {into}, n))
                if tried < now:
                    chosen ^= {out, into}
                    now, moved = tried, True
                    done.append({"out": out, "into": into, "loss": tried})
                    break
    return done
