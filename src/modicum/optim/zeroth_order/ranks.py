"""How many rank-one directions each matrix deserves, read off the singular values of the weights.

The gradient of a layer passes through the weights of its block, so its rank is at most the smallest numerical rank
among them. Residual connections carry the signal around a block, which is why the minimum is taken inside one. The
published text leaves criterion, threshold and scope open; all of them are knobs here, and ``target_mean_rank`` finds
the threshold that gives a wanted mean instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import check_choice

Criterion: TypeAlias = Literal["ratio", "energy", "nuclear", "stable"]
Scope: TypeAlias = Literal["layer", "block", "suffix"]


def singular_values(matrix: Float[Tensor, "*e m n"]) -> Float[Tensor, "*e k"]:
    """Return the singular values in float64, largest first, from the Gram matrix of the shorter side."""
    values = matrix.to(torch.float64)
    gram = values @ values.mT if values.shape[-2] <= values.shape[-1] else values.mT @ values
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)


def numerical_rank(values: Float[Tensor, " k"], *, criterion: Criterion = "ratio", threshold: float = 0.25) -> int:
    r"""Return the numerical rank of a matrix with these singular values, at least 1.

    Args:
        values: Singular values, largest first.
        criterion: ``ratio`` counts :math:`\sigma_i \ge \theta\sigma_1`; ``energy`` and ``nuclear`` take as many as hold
            the share :math:`\theta` of :math:`\sum\sigma^2` or :math:`\sum\sigma`; ``stable`` is
            :math:`\|W\|_F^2/\sigma_1^2` rounded up and has no threshold.
        threshold: :math:`\theta`, in (0, 1).

    Example:
        >>> numerical_rank(torch.tensor([1.0, 0.5, 0.3, 0.2, 0.1]), criterion="ratio", threshold=0.25)
        3
    """
    check_choice("rank_criterion", criterion, Criterion)
    if not 0 < threshold < 1:
        raise RecipeError(f"rank_threshold is {threshold}, expected between 0 and 1.")
    values = values.to(torch.float64)
    top = values[0]
    if not top > 0:
        return 1
    if criterion == "ratio":
        return int((values >= threshold * top).sum())
    if criterion == "stable":
        return int(((values**2).sum() / top**2 - 1e-9).ceil())
    parts = (values**2 if criterion == "energy" else values).cumsum(0)
    return int((parts < threshold * parts[-1]).sum()) + 1


def select_ranks(
    spectra: Mapping[str, Float[Tensor, " k"]],
    *,
    criterion: Criterion = "ratio",
    threshold: float = 0.25,
    scope: Scope = "block",
    smallest: Annotated[int, Ge(1)] = 1,
    largest: Annotated[int, Ge(1)] = 64,
    target_mean_rank: float | None = None,
) -> dict[str, int]:
    """Return a rank for each tensor from its singular values.

    Args:
        spectra: Singular values by tensor name, in the order of the forward pass.
        criterion: See :func:`numerical_rank`.
        threshold: See :func:`numerical_rank`.
        scope: Minimum over nothing (``layer``), over the tensors of the same numbered block (``block``), or over
            everything from here to the output (``suffix``).
        smallest: Lower limit.
        largest: Upper limit; also never above the number of singular values.
        target_mean_rank: Find the threshold that brings the mean this close instead of using ``threshold``.

    Example:
        >>> select_ranks({"h.0.a": torch.tensor([1.0, 0.9]), "h.0.b": torch.tensor([1.0, 0.1])})
        {'h.0.a': 1, 'h.0.b': 1}
    """
    check_choice("rank_scope", scope, Scope)
    if target_mean_rank is not None:
        threshold = _threshold_for(spectra, target_mean_rank, criterion, scope, smallest, largest)
    own = {name: numerical_rank(v, criterion=criterion, threshold=threshold) for name, v in spectra.items()}
    names = list(own)
    ranks = {}
    for position, name in enumerate(names):
        group = [name]
        if scope == "block":
            group = [other for other in names if _block(other) == _block(name)]
        elif scope == "suffix":
            group = names[position:]
        rank = min(own[other] for other in group)
        ranks[name] = min(max(min(rank, largest), smallest), len(spectra[name]))
    return ranks


def _threshold_for(
    spectra: Mapping[str, Tensor], wanted: float, criterion: Criterion, scope: Scope, smallest: int, largest: int
) -> float:
    if criterion == "stable":
        raise RecipeError("target_mean_rank needs a criterion with a threshold, got 'stable'. Use ratio or energy.")
    low, high = 1e-4, 1 - 1e-4
    for _ in range(24):
        middle = (low + high) / 2
        found = select_ranks(
            spectra, criterion=criterion, threshold=middle, scope=scope, smallest=smallest, largest=largest
        )
        too_many = sum(found.values()) / len(found) > wanted
        # A larger ratio keeps fewer values, a larger share of the energy more.
        low, high = (middle, high) if too_many == (criterion == "ratio") else (low, middle)
    return (low + high) / 2


def _block(name: str) -> str:
    """The part of a name up to its first number; a tensor outside every block is its own.

    Example:
        >>> _block("model.layers.3.mlp.up.weight"), _block("lm_head.weight")
        ('model.layers.3', 'lm_head.weight')
    """
    match = re.match(r"(.*?\.\d+)\.", name)
    return match.group(1) if match else name
