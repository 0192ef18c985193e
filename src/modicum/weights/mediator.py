r"""Which layers of several fine-tunes contradict each other, and which of them to keep apart.

Fine-tunes of one base pull many weights in opposite directions. Averaging such layers loses what each expert learned;
averaging layers that agree loses nothing. :func:`layer_conflict` measures the share of contradicting signs of each
layer in one streaming pass, :func:`select_layers` picks the layers that are worth keeping apart, and
:func:`build_experts` stores these as one dense layer and one compressed difference for each expert.

Reference: "Mediator: Memory-efficient LLM Merging with Less Parameter Conflicts and Uncertainty Based Routing", 2025,
arXiv:2502.04411. The parts and their roles are the published ones. The published text that could be consulted gives
neither the definition of the conflict for more than two experts nor the threshold: both are our choice, and options.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import numpy as np
import torch

from modicum.errors import RecipeError, did_you_mean
from modicum.layout import Unit, natural, unit_of
from modicum.random import derive_seed
from modicum.weights.aliases import aligned
from modicum.weights.compatibility import Tensors, label, spec_of
from modicum.weights.expert_plan import check_experts
from modicum.weights.experts import ExpertSet, build_experts
from modicum.weights.kernels.compare import refuse_non_finite
from modicum.weights.kernels.conflict import Aggregate, Counts, Denoise, Weight, conflict_counts, ratio
from modicum.weights.stream import cores, run_all

__all__ = [
    "ExpertSet",
    "build_experts",
    "chance_level",
    "conflict_counts",
    "layer_conflict",
    "ratio",
    "select_layers",
    "units_of",
]

Scope: TypeAlias = Literal["tensor", "unit"]
Rule: TypeAlias = Literal[
    "mean_std", "topk", "quantile", "absolute", "chance", "budget_bytes", "all", "none", "first", "least", "random"
]
U = TypeVar("U", bound=Hashable)


def layer_conflict(
    base: Tensors,
    experts: Sequence[Tensors],
    *,
    aggregate: Aggregate = "pairwise_mean",
    weight: Weight = "count",
    denoise: Denoise = "topk",
    keep: float = 0.2,
    sigma: float = 1.0,
    scope: Scope = "tensor",
    unit: Unit = "block",
    workers: int | None = None,
) -> dict[str, float]:
    r"""Return how much the experts contradict each other in every layer, from 0 to 1.

    With :math:`\tau_t = \theta_t - \theta_0`, entries that the denoising drops counting as zero,

    .. math::
        d_l = \operatorname{mean}_{s<t} \frac{|\{i \in l : \tau_{s,i} \tau_{t,i} < 0\}|}
                                              {|\{i \in l : \tau_{s,i} \ne 0, \tau_{t,i} \ne 0\}|}

    and 0 where no entry is active in two experts: a pair of experts that change nothing in common counts as a pair that
    agrees. The counts of all tensors of a layer are summed before they are
    divided. Experts whose signs are independent have :math:`d_l` near 1/2.

    Args:
        base: Tensors of the model that the experts were trained from, by name; a mapping or a ``Checkpoint``.
        experts: The tensors of at least two experts, of the same names and shapes.
        aggregate: ``pairwise_mean`` is the formula above; ``any`` is the share of the entries active in two or more
            experts on which both signs occur.
        weight: ``count`` counts entries; ``magnitude`` weighs each by the smaller of the two magnitudes (for ``any``,
            by the second largest of all).
        denoise: ``topk`` keeps each expert's largest entries, ``sigma`` those above a multiple of their root mean
            square, ``none`` all.
        keep: For ``topk``, the share that is kept, in (0, 1].
        sigma: For ``sigma``, the multiple, above 0.
        scope: Where the threshold of the denoising is taken: each ``tensor`` for itself, or the whole ``unit``.
        unit: What a layer is: a transformer block, a part of one, or a single module.
        workers: Threads; one for each core when not given.

    Returns:
        The conflict of each layer, in the order of the model. Tensors outside the layers take part only where a model
        has no layers at all, each as a layer of its own. Layers of vectors alone, such as norms under
        ``unit="matrix"``, take part only where there are no others.

    Raises:
        ModicumError: There are fewer than two experts, their tensors do not fit together or are not finite, or a knob
            is out of range.

    Example:
        >>> base = {"w": torch.zeros(4)}
        >>> one, two = {"w": torch.tensor([1.0, -2, 0, 3])}, {"w": torch.tensor([2.0, 1, 5, -1])}
        >>> layer_conflict(base, [one, two], denoise="none")
        {'w': 0.6666666666666666}

    Cost:
        Every tensor is read twice where it is denoised, once else. Memory is that of a few blocks of a tensor; under
        ``scope="unit"``, that of a whole layer of all models.

    Reference:
        "Mediator: Memory-efficient LLM Merging with Less Parameter Conflicts and Uncertainty Based Routing", 2025,
        arXiv:2502.04411. The published description says sign agreement after denoising; the formula is our choice.
    """
    _check(aggregate=(aggregate, Aggregate), weight=(weight, Weight), denoise=(denoise, Denoise))
    _check(scope=(scope, Scope), unit=(unit, Unit))
    check_denoising(keep=keep, sigma=sigma)
    if len(experts) < 2:
        raise RecipeError(f"experts: got {len(experts)}, expected at least 2. A single expert is no conflict: load it.")
    models = aligned([base, *experts])
    names = [label(model, "base" if i == 0 else f"experts[{i - 1}]") for i, model in enumerate(models)]
    check_experts(models, names)
    units = units_of(models[0], unit=unit)
    knobs: dict[str, Any] = {"aggregate": aggregate, "weight": weight, "denoise": denoise, "keep": keep, "sigma": sigma}

    def count(name: str) -> Counts:
        members = units[name] if scope == "unit" else [name]
        parts = []
        for member in members:
            tensors = [model[member] for model in models]
            refuse_non_finite(member, tensors, names)
            parts.append(tensors)
        tensors = parts[0] if len(parts) == 1 else [torch.cat([t.reshape(-1) for t in same]) for same in zip(*parts)]
        return conflict_counts(tensors[0], tensors[1:], **knobs)

    work = list(units) if scope == "unit" else [name for members in units.values() for name in members]
    found = dict(run_all(count, work, workers=workers or cores()))
    groups = {name: [found[name]] if scope == "unit" else [found[m] for m in units[name]] for name in units}
    return {name: ratio(counts) for name, counts in groups.items()}


def check_denoising(*, keep: float, sigma: float) -> None:
    """Refuse a share or a multiple that is out of range."""
    if not 0 < keep <= 1:
        raise RecipeError(f"keep is {keep}, expected a share above 0 and up to 1.")
    if not sigma > 0:
        raise RecipeError(f"sigma is {sigma}, expected a number above 0.")


def _check(**choices: tuple[str, Any]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in get_args(allowed):
            raise RecipeError(f"{name} {value!r} is not known. {did_you_mean(str(value), get_args(allowed))}")


def units_of(tensors: Tensors, *, unit: Unit = "block") -> dict[str, list[str]]:
    """Return the layers of a model with the names of their floating-point tensors, in the order of the model.

    Example:
        >>> units_of({"h.0.w": torch.ones(2, 2), "h.0.b": torch.ones(2), "wte.weight": torch.ones(2, 2)})
        {'h.0': ['h.0.b', 'h.0.w']}
    """
    specs = {name: spec_of(tensors, name) for name in sorted(tensors, key=natural)}
    kept = [name for name, spec in specs.items() if spec.dtype.is_floating_point]
    found: dict[str, list[str]] = {}
    for name in kept:
        if (place := unit_of(name, unit)) is not None:
            found.setdefault(place, []).append(name)
    if not found:
        return {name: [name] for name in kept}
    with_matrix = {u: members for u, members in found.items() if any(len(specs[m].shape) > 1 for m in members)}
    return with_matrix or found


def chance_level(
    experts: int, *, aggregate: Aggregate = "pairwise_mean", denoise: Denoise = "topk", keep: float = 0.2
) -> float:
    """Return the conflict of experts whose signs and places are independent.

    Example:
        >>> [round(chance_level(3, aggregate="any", denoise=d), 4) for d in ("topk", "none")]
        [0.5192, 0.75]
    """
    if aggregate == "pairwise_mean":
        return 0.5
    p = keep if denoise == "topk" else 1.0
    weights = {k: math.comb(experts, k) * p**k * (1 - p) ** (experts - k) for k in range(2, experts + 1)}
    return sum(w * (1 - 2 ** (1 - k)) for k, w in weights.items()) / sum(weights.values())


def select_layers(
    conflict: Mapping[U, float],
    *,
    rule: Rule = "mean_std",
    c: float = 1.0,
    k: float | None = None,
    q: float = 0.8,
    threshold: float = 0.5,
    chance: float = 0.5,
    budget: int | None = None,
    unit_bytes: Mapping[U, int] | None = None,
    seed: int = 0,
) -> list[U]:
    """Return the layers to keep apart, in descending order of conflict, equal ones by name.

    Args:
        conflict: The conflict of each layer; see :func:`layer_conflict`.
        rule: ``mean_std`` takes what lies more than ``c`` population standard deviations above the mean. ``topk``
            takes the ``k`` highest. ``quantile`` takes what lies above the quantile ``q``, ``absolute`` above
            ``threshold``, ``chance`` above ``c`` times ``chance``. ``budget_bytes`` takes layers until the next one
            would exceed ``budget``, so that a larger budget always gives a superset. Where all layers are alike, none
            of these but ``absolute`` and ``chance`` takes any. ``all`` and ``none`` say it.
            ``first``, ``least`` and ``random`` take ``k`` layers by another order than conflict: they are the controls
            that show whether conflict matters.
        c: Factor of ``mean_std`` and ``chance``.
        k: Number of layers, or below 1 their share.
        q: Quantile, from 0 to 1.
        threshold: For ``absolute``.
        chance: Conflict of independent experts; see :func:`chance_level`.
        budget: Bytes that the layers of all experts may take.
        unit_bytes: Bytes that each layer of all experts takes.
        seed: For ``random``.

    Raises:
        RecipeError: A conflict is not a number from 0 to 1, a knob is missing or out of range, or the budget is smaller
            than the first layer.

    Example:
        >>> select_layers({"a": 0.2, "b": 0.3, "c": 0.25, "d": 0.7})
        ['d']
        >>> select_layers({"a": 0.7, "b": 0.3}, rule="budget_bytes", budget=10, unit_bytes={"a": 10, "b": 1})
        ['a']
    """
    _check(rule=(rule, Rule))
    for name, d in conflict.items():
        if not 0 <= d <= 1:
            raise RecipeError(f"conflict of {name!r} is {d}, expected a number from 0 to 1.")
    order = sorted(conflict, key=lambda name: (-conflict[name], natural(name)))
    values = list(conflict.values())
    if rule in ("all", "none") or not order:
        return order if rule == "all" else []
    alike = min(values) == max(values) and (len(values) > 1 or not values[0])
    fitting = list(_within(order, budget, unit_bytes)) if rule == "budget_bytes" else []
    if alike and rule in ("mean_std", "topk", "quantile", "budget_bytes"):
        return []  # no layer stands out, whatever rounding says
    if rule == "budget_bytes":
        return fitting
    if rule in ("topk", "first", "least", "random"):
        count = _number(k, len(order), rule)
        if rule == "random":
            order = sorted(order, key=lambda name: derive_seed(seed, "select_layers", str(name)))
        elif rule == "least":
            order = sorted(conflict, key=lambda name: (conflict[name], natural(name)))
        chosen = set(list(conflict)[:count] if rule == "first" else order[:count])
        return sorted(chosen, key=lambda name: (-conflict[name], natural(name)))
    share = _share(q)
    above = {
        "mean_std": lambda: statistics.fmean(values) + c * statistics.pstdev(values),
        "quantile": lambda: float(np.quantile(values, share)),
        "absolute": lambda: threshold,
        "chance": lambda: c * chance,
    }[rule]()
    return [name for name in order if conflict[name] > above]


def _share(q: float) -> float:
    if not 0 <= q <= 1:
        raise RecipeError(f"q is {q}, expected a quantile from 0 to 1.")
    return q


def _number(k: float | None, n: int, rule: str) -> int:
    if k is None or not (0 < k < 1 or (k >= 1 and k == int(k))):
        raise RecipeError(f"rule {rule} needs k, a number of layers or a share below 1; got {k}.")
    return min(n, max(1, round(k * n)) if k < 1 else int(k))


def _within(order: Sequence[U], budget: int | None, unit_bytes: Mapping[U, int] | None) -> Iterator[U]:
    if budget is None or unit_bytes is None:
        raise RecipeError("rule budget_bytes needs budget and unit_bytes, the bytes that each layer takes.")
    if missing := [name for name in order if name not in unit_bytes]:
        raise RecipeError(f"unit_bytes says nothing of {missing[0]!r}. Give the bytes of every layer.")
    if unit_bytes[order[0]] > budget:
        raise RecipeError(
            f"budget is {budget} bytes, and {order[0]}, the layer of most conflict, takes {unit_bytes[order[0]]}. "
            f"Give at least {unit_bytes[order[0]]}, or choose a smaller store."
        )
    used = 0
    for name in order:
        used += unit_bytes[name]
        if used > budget:
            return
        yield name
