"""TSV-M with a weight for each expert from its outliers and a rank for each layer from its sparsity (RESM, R-TSVM).

The paper names these two additions; their formulas here are our choice. Use it beside ``tsv``, not instead: the weights
helped in one of our studies and hurt the worst task in another, which is why they are bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from modicum.errors import RecipeError, did_you_mean
from modicum.linalg import SVD, Solver
from modicum.registry import merge_method
from modicum.types import Fraction, NonNegative, PositiveInt, UnitInterval
from modicum.weights.kernels.blocks import check_length
from modicum.weights.kernels.matrices import merge_matrices
from modicum.weights.methods.tsv import combine, decompose

Each = Callable[[Callable[[Tensor, Sequence[Tensor]], Any]], Mapping[str, Any]]
Mode = Literal["mass", "ratio", "count", "mitigate", "none"]
Axis = Literal["matrix", "column", "row"]
Normalize = Literal["mean1", "sum1", "softmax"]
Rule = Literal["sparsity", "uniform", "mean-preserving", "mean_preserving", "energy", "per_task"]
MEANS = ("mean-preserving", "mean_preserving")  # two ways to write one rule


def survey(each: Each, *, ranks: Rule | list[int], c: float, eps: float | None, **_: Any) -> dict[str, dict[str, Any]]:
    """Compare every matrix with the densest of the model, or with the mean over the model."""
    if ranks not in ("sparsity", *MEANS):
        return {}

    def measure(base: Tensor, experts: Sequence[Tensor]) -> float | None:
        if base.ndim < 2:
            return None
        deltas = [expert.float() - base.float() for expert in experts]
        return sum(occupancy(delta, c=c, eps=eps) for delta in deltas) / len(deltas)

    found = each(measure)
    known = [value for value in found.values() if value is not None]
    if not known:
        return {}
    reference = max(known) if ranks == "sparsity" else sum(known) / len(known)
    return {name: {"reference": reference} for name in found}


@merge_method(
    "resm",
    paper="arXiv:2502.06876",
    laws={"bounded", "permutation", "zero_delta", "scale", "shift", "transpose"},
    matrix=True,
    supplied={"reference", "report"},
    survey=survey,
    bound=4.0,
)
def resm(
    base: Tensor,
    experts: Sequence[Tensor],
    *,
    alpha: float = 1.0,
    weights: Mode | list[float] | None = None,
    outliers: Mode = "mass",
    axis: Axis = "matrix",
    sigmas: NonNegative = 3.0,
    bounds: tuple[float, float] | None = (0.5, 2.0),
    normalize: Normalize = "mean1",
    ranks: Rule | list[PositiveInt] = "sparsity",
    c: NonNegative = 0.1,
    eps: NonNegative | None = None,
    eta: Fraction = 0.9,
    whiten_rtol: UnitInterval = 1e-2,
    solver: Solver = "gram",
    reference: float | None = None,
    report: list[dict[str, Any]] | None = None,
) -> Tensor:
    r"""Weigh the experts' singular values by their outliers, keep fewer of them in sparse layers, then merge as TSV-M.

    .. math::
        w_t = T \frac{s_t}{\sum_u s_u}, \quad
        s_t = \sum_{|\tau_{t,ij}| > \mu_t + 3\sigma_t} |\tau_{t,ij}|, \quad
        k = \Big\lfloor \frac{r}{T} \cdot \frac{1 - \Omega}{\max_l (1 - \Omega^l)} \Big\rfloor

    where :math:`\Omega` is the share of entries of at most ``c`` times the mean magnitude.

    Args:
        base: The tensor that the experts were trained from.
        experts: One tensor of each expert.
        alpha: Factor on the merged delta.
        weights: One for each expert, in place of what its outliers say; or the name of a mode, in place of
            ``outliers``.
        outliers: What an expert's weight comes from: the ``mass`` of its outliers, their ``ratio`` to all its
            magnitudes, their ``count``; ``mitigate`` clips them instead and weighs all alike; ``none`` does neither.
        axis: Whether an expert has one weight for the ``matrix``, or one for each ``column`` (input) or ``row``
            (output), which multiplies the delta before it is decomposed.
        sigmas: How many standard deviations above the mean magnitude an outlier lies.
        bounds: Least and largest weight before they are normalized again; ``null`` for none.
        normalize: ``mean1`` makes the weights average 1, ``sum1`` makes them sum to 1, ``softmax`` takes a softmax of
            the scores and makes it average 1.
        ranks: How many singular vectors: ``sparsity`` as above, ``mean-preserving`` relative to the mean layer,
            ``uniform`` as TSV-M, ``energy`` the fewest that hold ``eta`` of the squares, ``per_task`` shared between
            the experts in proportion to how dense they are. Or a number for each expert.
        c: How small an entry counts as zero, relative to the mean magnitude.
        eps: The same as an absolute magnitude, in place of ``c``.
        eta: Share of the squared singular values to keep, for ``energy``.
        whiten_rtol: As in :func:`modicum.weights.methods.tsv.tsv`.
        solver: As in :func:`modicum.weights.methods.tsv.tsv`.
        reference: Density of the densest (or mean) matrix of the model, found by a pass over it.
        report: As in :func:`modicum.weights.methods.tsv.tsv`, with the experts' ``weights``.

    Returns:
        The merged tensor. Tensors that are not matrices get the mean of the deltas.

    Raises:
        RecipeError: ``bounds`` are not positive and ordered, or weights or ranks do not fit the experts.

    Example:
        >>> import torch
        >>> resm(torch.zeros(2, 2), [torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))])
        tensor([[2., 0.],
                [0., 1.]])

    Cost:
        As TSV-M, and one pass over the model for the ranks.

    Deviates:
        The published text names outlier-aware weights and sparsity-adaptive ranks; these formulas are our choice.

    Reference:
        Yang et al., "Mix Data or Merge Models? Balancing the Helpfulness, Honesty, and Harmlessness of Large Language
        Model via Model Merging", NeurIPS 2025, arXiv:2502.06876.
    """
    if bounds is not None and not 0 < bounds[0] <= 1 <= bounds[1]:
        raise RecipeError(f"resm: bounds {bounds} should hold 1 between two positive numbers, for example [0.5, 2].")

    mode = weights if isinstance(weights, str) else outliers
    given = weights if isinstance(weights, list) else None
    for name, values in (("weights", weights), ("ranks", ranks)):
        if isinstance(values, list):
            check_length(name, values, len(experts))

    def merge(deltas: list[Tensor]) -> Tensor:
        if given is None:
            found = outlier_weights(deltas, mode=mode, alpha=sigmas, clip=bounds, axis=axis, normalize=normalize)
        else:
            found = list(given)
        if mode == "mitigate" and given is None:
            deltas = [_mitigated(delta, sigmas, axis) for delta in deltas]
        shares = [occupancy(delta, c=c, eps=eps) for delta in deltas]
        short = min(deltas[0].shape)
        if isinstance(ranks, list):
            plan = _checked_ranks(ranks, short)
        else:
            plan = rank_plan(shares, short, rule=ranks, reference=reference)
        if axis != "matrix" and given is None:
            deltas = [delta * weight for delta, weight in zip(deltas, found)]
        factors = [weight if isinstance(weight, float) else 1.0 for weight in found]
        parts = []
        for delta, k, weight in zip(deltas, plan, factors):
            part = decompose(delta, k, solver, whiten_rtol=whiten_rtol)
            if ranks == "energy":
                part = shortest(part, total=float(delta.double().square().sum()), eta=eta)
            parts.append(part if weight == 1 else SVD(part.U, part.S * weight, part.V))
        told: list[dict[str, Any]] = []
        merged = (alpha * combine(parts, whiten_rtol=whiten_rtol, report=told)).to(deltas[0].dtype)
        if report is not None:
            report.extend({**one, "weights": [float(torch.as_tensor(w).mean()) for w in found]} for one in told)
        return merged

    return merge_matrices(base, experts, merge)


class Outliers(NamedTuple):
    """Magnitudes far above the mean: from where on, their sum, that of all, and which share of the entries they are."""

    limit: float
    mass: float
    total: float
    share: float


def outliers_of(delta: Tensor, sigmas: float) -> Outliers:
    """Find the magnitudes that lie more than so many standard deviations above their mean.

    Example:
        >>> outliers_of(torch.tensor([1.0] * 99 + [101.0]), sigmas=3.0)[1:]
        (101.0, 200.0, 0.01)
    """
    magnitude = delta.abs().reshape(-1)
    n, total = len(magnitude), float(magnitude.sum(dtype=torch.float64))
    variance = float(torch.dot(magnitude, magnitude)) / n - (total / n) ** 2
    limit = total / n + sigmas * math.sqrt(max(variance, 0.0))
    over = torch.nn.functional.hardshrink(magnitude, limit)
    return Outliers(limit, float(over.sum(dtype=torch.float64)), total, int(over.count_nonzero()) / n)


def outlier_weights(
    deltas: Sequence[Tensor],
    *,
    mode: Mode = "mass",
    alpha: float = 3.0,
    clip: tuple[float, float] | None = (0.5, 2.0),
    axis: Axis = "matrix",
    normalize: Normalize = "mean1",
) -> list[Any]:
    """Return a weight for each delta, larger the more of it lies in outliers.

    Args:
        deltas: Matrices of one shape.
        mode: See :func:`resm`.
        alpha: How many standard deviations above the mean magnitude an outlier lies.
        clip: Least and largest weight before they are normalized again; ``None`` for none.
        axis: ``matrix``, or one weight for each ``column`` or ``row``.
        normalize: See :func:`resm`.

    Returns:
        Numbers; along an axis, tensors of the shape ``(1, n)`` for columns and ``(m, 1)`` for rows.

    Example:
        >>> heavy = torch.eye(20)
        >>> outlier_weights([heavy, 3 * heavy])
        [0.5, 1.5]
    """
    for name, value, known in (("mode", mode, Mode), ("axis", axis, Axis), ("normalize", normalize, Normalize)):
        if value not in get_args(known):
            raise RecipeError(f"{name} {value!r} is not known. {did_you_mean(str(value), get_args(known))}")
    if axis != "matrix":
        return _weights_along(deltas, mode, alpha, clip, axis, normalize)
    scores = []
    for found in (outliers_of(delta, alpha) for delta in deltas):
        ratio = found.mass / found.total if found.total else 0.0
        scores.append({"mass": found.mass, "ratio": ratio, "count": found.share}.get(mode, 0.0))
    return _normalized(scores, clip, normalize) if mode not in ("none", "mitigate") else [1.0] * len(deltas)


def _normalized(scores: list[float], clip: tuple[float, float] | None, normalize: Normalize) -> list[float]:
    n = len(scores)
    if normalize == "softmax":
        powers = [math.exp(score - max(scores)) for score in scores]
        weights = [n * power / sum(powers) for power in powers]
    else:
        total = sum(scores)
        weights = [n * score / total for score in scores] if total else [1.0] * n
    if clip is not None:
        weights = [min(clip[1], max(clip[0], weight)) for weight in weights]
    total = sum(weights)
    if len(set(weights)) == 1:
        weights = [1.0] * n
    else:
        weights = [n * weight / total for weight in weights]
    return [weight / n for weight in weights] if normalize == "sum1" else weights


def _weights_along(
    deltas: Sequence[Tensor],
    mode: Mode,
    alpha: float,
    clip: tuple[float, float] | None,
    axis: Axis,
    normalize: Normalize,
) -> list[Tensor]:
    """Return weights of lines: each line is weighed as a matrix of its own would be."""
    lines = [delta.T if axis == "column" else delta for delta in deltas]
    found = [outlier_weights(same, mode=mode, alpha=alpha, clip=clip, normalize=normalize) for same in zip(*lines)]
    along = torch.tensor(found, dtype=deltas[0].dtype, device=deltas[0].device).T
    return [weights[None, :] if axis == "column" else weights[:, None] for weights in along]


def _mitigated(delta: Tensor, alpha: float, axis: Axis) -> Tensor:
    if axis == "matrix":
        limit = outliers_of(delta, alpha).limit
        return delta.clamp(-limit, limit)
    lines = delta.T if axis == "column" else delta
    clamped = torch.stack([_mitigated(line, alpha, "matrix") for line in lines])
    return clamped.T if axis == "column" else clamped


def _checked_ranks(ranks: list[int], short: int) -> list[int]:
    if sum(ranks) > short:
        raise RecipeError(
            f"resm: ranks are {ranks}, {sum(ranks)} together, but a matrix of this model has only {short} singular "
            "vectors, which the experts share. Lower them, or name a rule."
        )
    return ranks


def occupancy(delta: Tensor, *, c: float = 0.1, eps: float | None = None) -> float:
    """Return the share of entries that are more than next to nothing: one minus the sparsity."""
    magnitude, n = delta.abs(), delta.numel()
    limit = c * float(magnitude.sum(dtype=torch.float64)) / n if eps is None else eps
    return int((magnitude > limit).count_nonzero()) / n


def rank_plan(
    shares: Sequence[float], short: int, *, rule: Rule = "sparsity", reference: float | None = None
) -> list[int]:
    """Return how many singular vectors each expert keeps: at least 1, together at most ``short`` where there is room.

    Args:
        shares: How dense each expert's delta is.
        short: The matrix's short side.
        rule: See :func:`resm`.
        reference: Density of the densest or mean matrix of the model; that of this matrix when not given.

    Example:
        >>> rank_plan([0.5, 0.5], 8, reference=1.0), rank_plan([0.6, 0.2], 8, rule="per_task")
        ([2, 2], [6, 2])
    """
    n = len(shares)
    room = max(1, short // n)
    if rule == "per_task" and any(shares):
        exact = [share / sum(shares) * max(short, n) for share in shares]
        plan = [max(1, int(value)) for value in exact]
        order = sorted(range(n), key=lambda t: int(exact[t]) - exact[t])
        for t in order:
            if sum(plan) < short:
                plan[t] += 1
        while sum(plan) > max(short, n):
            plan[plan.index(max(plan))] -= 1
        return plan
    density = sum(shares) / n
    if rule in ("sparsity", *MEANS) and reference:
        return [min(room, max(1, int(room * density / reference + 1e-9)))] * n
    return [room] * n


def shortest(part: SVD, *, total: float, eta: float) -> SVD:
    """Keep the fewest leading components whose squares make up ``eta`` of ``total``."""
    energy = part.S.double().square().cumsum(0)
    k = min(len(part.S), int((energy < eta * total).sum()) + 1)
    return SVD(part.U[:, :k], part.S[:k], part.V[:, :k])
