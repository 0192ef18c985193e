r"""From a prompt's features to the weights of the experts, by a router that knows when it does not know.

:func:`fit_router` learns which task a prompt belongs to, :func:`calibrate` makes its probabilities honest on held-out
prompts, :func:`routing_weights` turns them into weights of the experts: one expert where they are sure, a blend where
they are not, the average of all where they know nothing.

Reference: "Mediator", 2025, arXiv:2502.04411. Published is that experts are chosen for each request and merged by the
uncertainty of its task; the router's shape, its features and the thresholds are our choice, and options.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from modicum.errors import RecipeError, did_you_mean
from modicum.models.router_fitting import centers, directions, fit_linear, fit_mlp, mahalanobis, rank_of, residuals

Kind: TypeAlias = Literal["linear", "mlp", "subspace", "entropy"]
Selection: TypeAlias = Literal["entropy_gated", "soft", "top1", "nucleus", "uniform", "standardised"]
Logits: TypeAlias = Tensor | Sequence[Any]


@dataclass(frozen=True)
class Router:
    """A fitted router.

    Attributes:
        kind: How logits are made of features.
        experts: How many there are.
        tensors: Its numbers, by name.
        temperature: See :func:`calibrate`.
        threshold: Distance from the nearest task beyond which a prompt is unknown; ``None`` for no gate.
    """

    kind: Kind
    experts: int
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    temperature: float = 1.0
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.threshold is not None and "centers" not in self.tensors:
            raise RecipeError(
                "A threshold needs the tasks' centers, which a router without a gate does not keep. Fit it again."
            )

    def logits(self, features: Tensor) -> Tensor:
        """Return a number for each expert, from features ``(n, d)``: the higher, the likelier.

        For ``entropy`` the features are the entropies of the experts' own predictions ``(n, T)``, in nats.
        """
        x = features.to(torch.float64)
        if self.kind == "entropy":
            return -x
        if self.kind == "subspace":
            return -residuals(x, list(self.tensors["bases"]))
        x = (x - self.tensors["mean"]) / self.tensors["std"]
        if self.kind == "linear":
            return x @ self.tensors["weight"].T + self.tensors["bias"]
        layers = [(self.tensors[f"w{i}"].double(), self.tensors[f"b{i}"].double()) for i in range(3)]
        for weight, bias in layers[:-1]:
            x = nn.functional.leaky_relu(x @ weight.T + bias)
        return x @ layers[-1][0].T + layers[-1][1]

    def distance(self, features: Tensor) -> Tensor | None:
        """Return the Mahalanobis distance to the nearest task in multiples of the threshold, if there is one."""
        if self.threshold is None:
            return None
        return mahalanobis(features, self.tensors["centers"], self.tensors["precision"]) / self.threshold


def fit_router(
    features: Tensor,
    labels: Tensor | Sequence[int],
    *,
    kind: Kind = "linear",
    label_smoothing: float = 0.0,
    decay: float = 1e-3,
    rank: int = 8,
    epochs: int = 50,
    seed: int = 0,
) -> Router:
    r"""Learn which expert a prompt belongs to.

    ``linear`` minimises, over features of mean 0 and deviation 1,

    .. math::
        \frac1n \sum_i \operatorname{CE}(W x_i + b, y_i) + \frac{\lambda}{2} \|W\|^2

    ``mlp`` has two hidden layers of 2·d with batch norm, leaky ReLU and dropout 0.5. ``subspace`` learns no weights:
    its logits are the negative lengths of what a task's leading directions leave of a prompt. ``entropy`` learns
    nothing: its features are the entropies of the experts' predictions.

    Args:
        features: One row for each prompt ``(n, d)``.
        labels: Number of the expert that each prompt belongs to, from 0 on; at least two different ones.
        kind: Kind of router.
        label_smoothing: Share of the target that is spread over all experts, from 0 up to but not including 1.
        decay: λ, 0 or above.
        rank: Directions of each task, for ``subspace``; d divided by the number of tasks at most, since directions that
            span all features leave nothing of any prompt.
        epochs: For ``mlp``.
        seed: For ``mlp``.

    Returns:
        The router, with temperature 1 and the tasks' centers for the distance gate; see :func:`calibrate`.

    Raises:
        RecipeError: Features and labels do not fit together, are not finite, or are of one task alone.

    Example:
        >>> x = torch.tensor([[0.0, 1], [0, 2], [3, 0], [4, 0]])
        >>> fit_router(x, [0, 0, 1, 1]).logits(x).argmax(1).tolist()
        [0, 0, 1, 1]

    Cost:
        For ``linear`` a few dozen passes over the features, a second for thousands of prompts.

    Deviates:
        The MLP is the one of Twin-Merging's code. MASS takes its directions from the experts' weights; here they are
        those of the tasks' features, at the same tap.

    Reference:
        Lu et al., "Twin-Merging", 2024, arXiv:2406.15479; Crisostomi et al., "MASS", 2025, arXiv:2504.05342; Oh et al.,
        "DaWin", 2024, arXiv:2410.03782.
    """
    if kind not in get_args(Kind):
        raise RecipeError(f"kind {kind!r} is not known. {did_you_mean(str(kind), get_args(Kind))}")
    if not 0 <= label_smoothing < 1 or decay < 0:
        raise RecipeError(
            f"label_smoothing is {label_smoothing} and decay {decay}, expected a share below 1 and no negative number."
        )
    x, y = torch.as_tensor(features).to(torch.float64), torch.as_tensor(labels, dtype=torch.int64)
    _check_rows(x, y)
    count = int(y.max()) + 1
    if kind == "entropy":
        if x.shape[1] < count:
            raise RecipeError(f"entropy needs an entropy for each expert: got {x.shape[1]}, labels up to {count - 1}.")
        return Router(kind, x.shape[1])
    tensors = centers(x, y, count)
    if kind == "subspace":
        bases = [directions(x[y == t], rank_of(rank, x.shape[1], count)) for t in range(count)]
        return Router(kind, count, {**tensors, "bases": torch.stack(bases)})
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)
    z = (x - mean) / std
    fit = fit_linear if kind == "linear" else fit_mlp
    found = fit(z, y, count, smoothing=label_smoothing, decay=decay, epochs=epochs, seed=seed)
    return Router(kind, count, {**tensors, "mean": mean, "std": std, **found})


def _check_rows(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise RecipeError(f"features are {list(x.shape)} and labels {list(y.shape)}, expected (n, d) and (n).")
    if not bool(torch.isfinite(x).all()):
        raise RecipeError("features hold NaN or infinite values. The model is not usable.")
    if len(y) == 0 or bool((y < 0).any()) or len(set(y.tolist())) < 2:
        raise RecipeError("Router data is of one task or none. Give prompts of every expert's task, with its number.")
    if missing := sorted(set(range(int(y.max()) + 1)) - set(y.tolist())):
        raise RecipeError(f"Router data has no prompt of expert {missing[0]}. Give prompts of every expert's task.")


def calibrate(logits: Logits, labels: Tensor | Sequence[int]) -> float:
    r"""Return the temperature under which held-out labels are likeliest.

    .. math::
        T_c = \arg\min_T \sum_i \operatorname{CE}(z_i / T, y_i)

    Args:
        logits: A router's, of prompts that it was not fitted on ``(n, T)``.
        labels: Their experts.

    Returns:
        The temperature, between 0.001 and 1,000: where all labels are right, no finite one is best.

    Raises:
        RecipeError: The logits are not finite, or do not fit the labels.

    Example:
        >>> round(calibrate([[2.0, 0]] * 4, [0, 0, 0, 1]), 6)
        1.820478

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", 2017, arXiv:1706.04599, equation 9.
    """
    z, y = torch.as_tensor(logits, dtype=torch.float64), torch.as_tensor(labels, dtype=torch.int64)
    if z.ndim != 2 or len(z) != len(y) or not len(y) or not bool(torch.isfinite(z).all()):
        raise RecipeError(f"logits are {list(z.shape)}, labels {list(y.shape)}, expected finite (n, T) and (n).")
    if int(y.min()) < 0 or int(y.max()) >= z.shape[1]:
        raise RecipeError(f"labels run from {int(y.min())} to {int(y.max())}, expected 0 to {z.shape[1] - 1}.")
    right = z.gather(1, y[:, None])[:, 0]

    def slope(inverse: float) -> float:
        """Return the derivative of the loss by 1/T, which only rises."""
        return float(((z * inverse).softmax(1).mul(z).sum(1) - right).mean())

    low, high = math.log(1e-3), math.log(1e3)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def uncertainty(logits: Logits, *, temperature: float = 1.0) -> Tensor:
    r"""Return the entropy of the router's probabilities as a share of the largest possible, from 0 to 1.

    .. math::
        u = H(\operatorname{softmax}(z / T_c)) / \log T

    With a single expert it is 0.

    Example:
        >>> round(float(uncertainty([2.0, 1.0, 0.0, -1.0])), 6)
        0.683503
    """
    z = _checked(logits, temperature)[0]
    n = z.shape[-1]
    if n == 1:
        return torch.zeros(z.shape[:-1], dtype=z.dtype)
    logs = (z / temperature).log_softmax(-1)
    return -(logs.exp() * logs.clamp_min(-1e9)).sum(-1) / math.log(n)


def _checked(logits: Logits, temperature: float) -> tuple[Tensor, float]:
    """Return the logits in float64, and the tolerance that their own dtype needs."""
    if not temperature > 0:
        raise RecipeError(f"temperature is {temperature}, expected a number above 0.")
    given = torch.as_tensor(logits)
    exact = not isinstance(logits, Tensor) or given.dtype == torch.float64
    z = torch.as_tensor(logits, dtype=torch.float64)
    if z.ndim not in (1, 2) or not z.shape[-1]:
        raise RecipeError(f"logits are {list(z.shape)}, expected (T) or (n, T).")
    return z, 1e-9 if exact else 8 * torch.finfo(given.dtype if given.is_floating_point() else torch.float32).eps


def routing_weights(
    logits: Logits,
    *,
    temperature: float = 1.0,
    selection: Selection = "entropy_gated",
    u_lo: float = 0.1,
    u_hi: float = 0.9,
    nucleus: float = 0.9,
    distance: float | Tensor | None = None,
    least: float = 0.2,
) -> Tensor:
    r"""Return the weights of the experts: none is negative, they sum to 1.

    With :math:`p = \operatorname{softmax}(z / T_c)` and :math:`u = H(p) / \log T`, ``entropy_gated`` gives

    .. math::
        w = \begin{cases} \text{one-hot}(\arg\max p) & u \le u_{lo} \\
                          p \text{ on the smallest set of mass} \ge \nu, \text{ normalised} & u_{lo} < u < u_{hi} \\
                          1/T & u \ge u_{hi} \end{cases}

    Args:
        logits: Of one prompt ``(T)`` or several ``(n, T)``.
        temperature: See :func:`calibrate`; above 0.
        selection: The formula above; or always the probabilities (``soft``), the likeliest expert (``top1``), the
            smallest set (``nucleus``), equal weights (``uniform``); or ``standardised``, for a router of residuals:
            the softmax of the logits less their mean, in sample deviations, on the weights above ``least``.
        u_lo: Uncertainty up to which the likeliest expert stands alone.
        u_hi: Uncertainty from which on the experts weigh alike.
        nucleus: Mass ν of the smallest set, in (0, 1].
        distance: How far the prompt is from every task, in multiples of the farthest that is still known: above 1 the
            experts weigh alike, whatever the logits.
        least: For ``standardised``.

    Returns:
        The weights in float64, of the logits' shape. Uniform ones mean the dense model. Logits that are NaN or
        infinite give uniform weights, with a warning: such a prompt is as unknown as can be.

    Raises:
        RecipeError: A knob is out of range.

    Example:
        >>> p = torch.tensor([0.6, 0.3, 0.07, 0.03], dtype=torch.float64)
        >>> [round(w, 4) for w in routing_weights(p.log()).tolist()]
        [0.6667, 0.3333, 0.0, 0.0]

    Cost:
        None beside a model.

    Deviates:
        The three ranges, their thresholds and the nucleus are our choice; published is that experts are selected and
        merged by the uncertainty of the input's task.

    Reference:
        "Mediator", 2025, arXiv:2502.04411; Crisostomi et al., "MASS", 2025, arXiv:2504.05342, for ``standardised``.
    """
    z, tolerance = _checked(logits, temperature)
    if selection not in get_args(Selection):
        raise RecipeError(f"selection {selection!r} is not known. {did_you_mean(str(selection), get_args(Selection))}")
    if not 0 < nucleus <= 1:
        raise RecipeError(f"nucleus is {nucleus}, expected a share above 0 and up to 1.")
    if not 0 <= u_lo <= u_hi <= 1:
        raise RecipeError(f"u_lo is {u_lo} and u_hi {u_hi}, expected 0 <= u_lo <= u_hi <= 1.")
    rows = z.reshape(-1, z.shape[-1])
    # A logit of −∞ is a probability of zero; any other number that is not finite says nothing.
    known = ~(rows.isnan() | rows.isposinf()).any(1) & torch.isfinite(rows).any(1)
    if not bool(known.all()):
        said = f"The router's logits of {int((~known).sum())} prompts are not finite: the experts weigh alike there."
        warnings.warn(said, RuntimeWarning, stacklevel=2)
    rows = torch.where(known[:, None], rows, 0.0)
    n = rows.shape[1]
    p = (rows / temperature).softmax(1)
    even, single = torch.full_like(p, 1 / n), nn.functional.one_hot(rows.argmax(1), n).to(p)
    if selection == "entropy_gated":
        u = uncertainty(rows, temperature=temperature)[:, None]
        edge = tolerance  # u of a float32 number may miss a threshold that it meets
        w = torch.where(u <= u_lo + edge, single, torch.where(u >= u_hi - edge, even, _nucleus(p, nucleus - tolerance)))
    elif selection == "nucleus":
        w = _nucleus(p, nucleus - tolerance)
    elif selection == "standardised":
        q = standardised(rows)
        kept = torch.where(q > least, q, 0.0)
        w = torch.where(kept.sum(1, keepdim=True) > 0, kept / kept.sum(1, keepdim=True).clamp_min(1e-300), single)
    else:
        w = {"soft": p, "top1": single, "uniform": even}[selection]
    if distance is not None:
        far = torch.as_tensor(distance, dtype=torch.float64).reshape(-1)
        known = known & ~(far > 1) & torch.isfinite(far)
    return torch.where(known[:, None], w, even).reshape(z.shape)


def _nucleus(p: Tensor, mass: float) -> Tensor:
    """Return the probabilities of the smallest set that holds the mass, normalised; equal ones by their index."""
    ordered, places = p.sort(dim=1, descending=True, stable=True)
    before = ordered.cumsum(1) - ordered
    kept = torch.where(before < mass, ordered, 0.0)
    return torch.zeros_like(p).scatter(1, places, kept / kept.sum(1, keepdim=True))


def standardised(logits: Logits) -> Tensor:
    """Return the softmax of logits less their mean, in sample deviations: MASS' probabilities of residuals.

    Example:
        >>> [round(p, 6) for p in standardised([-4.0, -3.0, -5.0]).tolist()]
        [0.244728, 0.665241, 0.090031]
    """
    z = torch.as_tensor(logits, dtype=torch.float64)
    if z.shape[-1] < 2:
        return torch.ones_like(z)
    deviation = z.std(-1, keepdim=True)
    return ((z - z.mean(-1, keepdim=True)) / torch.where(deviation > 0, deviation, 1.0)).softmax(-1)


def is_uniform(weights: Tensor) -> Tensor:
    """Return whether the weights of each row are equal: such a row is answered by the dense model.

    Example:
        >>> is_uniform(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
        [True, False]
    """
    return weights.amax(-1) - weights.amin(-1) < 1e-6


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 10) -> float:
    """Return how far confidence is from accuracy, over bins of equal width.

    Example:
        >>> expected_calibration_error(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1]))
        0.0
    """
    confidence, guess = probabilities.max(1)
    right = (guess == labels).to(confidence.dtype)
    place = (confidence * bins).long().clamp_max(bins - 1)
    total = 0.0
    for b in range(bins):
        if bool((here := place == b).any()):
            total += abs(float(confidence[here].mean() - right[here].mean())) * float(here.double().mean())
    return total
