r"""The surrogate of the multilinear extension, and its gradients: sampled, and exact where closed forms exist.

.. math::
    F^s(x) = \int_0^1 \frac{e^{c(z-1)}}{z} F(zx)\,dz, \qquad \nabla F^s(x) = \int_0^1 e^{c(z-1)} \nabla F(zx)\,dz

Why it helps: by parts, :math:`\langle x, \nabla F^s \rangle = F(x) - c \int e^{c(z-1)} F(zx)\,dz`, and the curvature
``c`` gives :math:`\langle y, \nabla F(zx) \rangle \ge F(y) - c F(zx)`. The difference is :math:`\langle y - x, \nabla
F^s(x) \rangle \ge \frac{1 - e^{-c}}{c} F(y) - F(x)`: a stationary point of the surrogate is that good. A ``c`` above
the true curvature is valid too, one below is not.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.knobs import guarded
from modicum.submodular.functions.base import Objective, SetFunction, cached, no_closed_form, pieces
from modicum.submodular.geometry import numbers
from modicum.submodular.partition import Blocks, Partition
from modicum.types import PositiveInt, UnitInterval

SMALL = 1e-8  # a curvature below which its limit is as exact


@guarded
def surrogate_ratio(c: UnitInterval) -> float:
    r"""Return :math:`\kappa(c) = (1 - e^{-c}) / c`, the share of the optimum that the surrogate guarantees.

    Raises:
        RecipeError: ``c`` is outside [0, 1].

    Example:
        >>> surrogate_ratio(0), round(surrogate_ratio(1), 6)
        (1.0, 0.632121)
    """
    c = float(c)
    return 1 - c / 2 if c < SMALL else -math.expm1(-c) / c


@guarded
def sample_scale(u: Any, *, c: UnitInterval) -> Tensor:
    r"""Turn uniform numbers into scales ``z`` of density :math:`\propto e^{c(z-1)}` on [0, 1].

    .. math::
        z = \frac{\log(1 + u (e^c - 1))}{c}, \qquad z = u \text{ for } c \to 0

    Args:
        u: Numbers in [0, 1].
        c: The curvature.

    Raises:
        RecipeError: ``c`` is outside [0, 1].

    Example:
        >>> round(float(sample_scale(0.5, c=1)), 6)
        0.620115
    """
    c = float(c)
    u = numbers(u)
    return u if c < SMALL else (u * math.expm1(c)).log1p_().div_(c)


def default_nodes(x: Tensor) -> int:
    """Return how many nodes integrate exactly at these points: more agents, more nodes."""
    mass = float(x.sum(-1).max()) if x.numel() else 0.0
    return 8 + math.ceil(mass / 4)


@cache
def _legendre(nodes: int) -> tuple[Tensor, Tensor]:
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return torch.from_numpy((places + 1) / 2), torch.from_numpy(weights / 2)


def quadrature(nodes: int, *, c: float) -> tuple[Tensor, Tensor]:
    r"""Return Gauss–Legendre nodes on [0, 1] and their weights times :math:`e^{c(z-1)}`."""
    z, weights = _legendre(nodes)
    return z, weights * torch.exp(c * (z - 1))


@guarded
def surrogate_grad_exact(f: SetFunction, x: Any, *, c: UnitInterval = 1.0, nodes: PositiveInt | None = None) -> Tensor:
    r"""Return :math:`\nabla F^s(x)` by quadrature of the exact gradient.

    Args:
        f: A function with a closed form of its extension.
        x: Points, (..., n).
        c: The curvature.
        nodes: How many; ``8 + ceil(sum(x) / 4)`` where not given, exact to about 1e-12.

    Returns:
        Gradients, of the shape of ``x``.

    Raises:
        UnsupportedError: The extension has no closed form.
        RecipeError: ``c`` is outside [0, 1].

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> g = surrogate_grad_exact(FacilityLocation([[3.0, 1, 0], [0, 2, 2]]), [0.5, 0.25, 0.5], c=0)
        >>> [round(part, 9) for part in g.tolist()]
        [2.875, 2.25, 1.75]

    Cost:
        ``nodes`` exact gradients.

    Deviates:
        The publication samples; the closed form and the growing number of nodes are ours.

    Reference:
        Zhang et al., ICLR 2025, arXiv:2502.05028, Theorem 2.
    """
    if not f.exact:
        raise no_closed_form(f, "multilinear extension")
    point = f._point(x)
    z, weights = quadrature(nodes or default_nodes(point), c=float(c))
    # Nodes go behind the worlds, where functions of several worlds expect them.
    lead = len(f.worlds)
    scaled = torch.stack([point * scale for scale in z.tolist()], lead)
    slopes = f.multilinear_grad(scaled)
    return torch.tensordot(weights.to(slopes.device), slopes.movedim(lead, 0), 1)


@guarded
def surrogate_grad(
    f: Objective,
    x: Any,
    *,
    c: UnitInterval = 1.0,
    n_samples: PositiveInt = 1,
    stratified: bool = False,
    rng: torch.Generator | None = None,
) -> Tensor:
    r"""Return an unbiased estimate of :math:`\nabla F^s(x)` from gains.

    .. math::
        \hat g_a = \kappa(c)\,[f(R \cup a) - f(R \setminus a)], \qquad R \sim zx

    Args:
        f: The objective.
        x: Points, (..., n).
        c: The curvature.
        n_samples: How many sets are averaged.
        stratified: Spread the scales ``z`` evenly instead of independently.
        rng: Draws; seeded with 0 where not given.

    Returns:
        Estimates, of the shape of ``x``.

    Raises:
        RecipeError: ``c`` is outside [0, 1].

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> f = FacilityLocation([[1.0, 0.0], [0.0, 0.5]])  # modular: no noise at all
        >>> surrogate_grad(f, [0.3, 0.3], c=0).tolist()
        [1.0, 0.5]

    Cost:
        2n evaluations for each sample and point.

    Reference:
        Zhang et al., ICLR 2025, arXiv:2502.05028, Algorithm 1, line 11.
    """
    rng = rng or torch.Generator().manual_seed(0)
    point = numbers(x).double()
    ratio = surrogate_ratio(c)
    total = torch.zeros_like(point)
    everything = torch.arange(f.n)
    for sample in range(n_samples):
        u = torch.rand(*point.shape[:-1], 1, generator=rng, dtype=torch.float64)
        z = sample_scale((sample + u) / n_samples if stratified else u, c=c)
        mask = torch.rand(point.shape, generator=rng, dtype=torch.float64) < z * point
        total += torch.as_tensor(f.gains(mask, everything)).double()
    return total * (ratio / n_samples)


@guarded
def policy_surrogate_grad_exact(
    f: SetFunction, x: Any, blocks: Blocks | Partition, *, nodes: PositiveInt | None = None, linear: bool = True
) -> Tensor:
    r"""Return the exact gradient of the policy extension's surrogate, for each agent's own actions.

    .. math::
        g_a = \int_0^1 e^{z-1}\, \mathbb E[f(S_z \cup a) - f(S_z)]\,dz + \tfrac1e [f(V) - f(V \setminus a)]

    where :math:`S_z` holds the action that each *other* agent draws, if it is present, which it is with probability
    ``z``.

    Args:
        f: A function with a closed form of this expectation.
        x: Block-wise probabilities, (n,) if all agents agree, or a row for each agent, (..., agents, n).
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        nodes: How many nodes of the integral; ``8 + ceil(sum(x) / 4)`` where not given.
        linear: Add the second term, which lifts the ratio to 1 - c/e.

    Returns:
        Of (n,) the gradient in that order; of rows each agent's own, (..., agents, widest block).

    Raises:
        UnsupportedError: There is no closed form.

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> g = policy_surrogate_grad_exact(FacilityLocation([[1.0, 0.0], [0.0, 0.5]]), [1.0, 1.0], [1, 1])
        >>> [round(part, 12) for part in g.tolist()]
        [1.0, 0.5]

    Cost:
        ``nodes`` × agents × rows × elements.

    Reference:
        Zhang et al., "MA-SPL", NeurIPS 2025, arXiv:2509.22596; the closed form is ours.
    """
    partition = blocks if isinstance(blocks, Partition) else Partition.of(blocks)
    point = f._point(x)
    alone = point.ndim == 1
    rows = point.expand(partition.agents, -1) if alone else point
    z, weights = quadrature(nodes or default_nodes(point), c=1.0)
    lead = len(f.worlds)
    gains = f.policy_gains(rows, partition, z.to(point.device))
    own = torch.tensordot(weights.to(gains.device), gains, 1)
    if linear:
        last = f.last_gains().double() / math.e
        own = own + partition.cut(last).reshape(*last.shape[:lead], *[1] * (own.ndim - 2 - lead), *own.shape[-2:])
    if not alone:
        return own
    out = torch.zeros_like(point)
    out[partition.order] = own[partition.valid]
    return out


@guarded
def policy_surrogate_grad(
    f: Objective, x: Any, blocks: Blocks, *, n_samples: PositiveInt = 1, rng: torch.Generator | None = None
) -> Tensor:
    r"""Return an unbiased estimate of the policy extension's gradient from gains (see the exact one).

    .. math::
        \hat g_a = (1 - \tfrac1e)[f(S \cup a) - f(S)] + \tfrac1e [f(V) - f(V \setminus a)]

    Args:
        f: The objective.
        x: Block-wise probabilities, (n,).
        blocks: Element numbers of each agent's actions, or sizes of blocks.
        n_samples: How many sets are averaged.
        rng: Draws; seeded with 0 where not given.

    Returns:
        The estimate, (n,).

    Example:
        >>> from modicum.submodular import FacilityLocation
        >>> g = policy_surrogate_grad(FacilityLocation([[1.0, 0.0], [0.0, 0.5]]), [1.0, 1.0], [1, 1])
        >>> [round(part, 12) for part in g.tolist()]
        [1.0, 0.5]

    Cost:
        Two evaluations for each action and sample, and two more of each for the linear term.

    Reference:
        Zhang et al., "MA-SPL", NeurIPS 2025, arXiv:2509.22596.
    """
    rng = rng or torch.Generator().manual_seed(0)
    partition, point = Partition.of(blocks), numbers(x).double()
    everything = torch.arange(f.n)
    total = torch.zeros_like(point)
    for _ in range(n_samples):
        z = sample_scale(torch.rand(partition.agents, 1, 1, generator=rng, dtype=torch.float64), c=1.0)
        drawn = torch.rand(partition.agents, partition.agents, generator=rng, dtype=torch.float64)
        members = draw_members(point.expand(partition.agents, -1), partition, z[..., 0], drawn)
        masks = torch.zeros(partition.agents, f.n + 1, dtype=torch.bool).scatter_(-1, members, True)[:, :-1]
        for agent, block in enumerate(partition.blocks):
            places = torch.tensor(block)
            total[places] += torch.as_tensor(f.gains(masks[agent], places)).double()
    last = torch.as_tensor(f.gains(torch.ones(f.n, dtype=torch.bool), everything)).double()
    return (1 - 1 / math.e) * total / n_samples + last / math.e


def draw_members(x: Tensor, partition: Partition, z: Tensor, u: Tensor, agents: Tensor | None = None) -> Tensor:
    """Draw the action of every other agent, each present with probability ``z`` times its mass.

    Args:
        x: A row of probabilities for each agent, (..., rows, n).
        partition: Whose the elements are.
        z: The scale of each row, (..., rows, 1).
        u: A uniform number for each row and other agent, (..., rows, agents).
        agents: Whose the rows are; all agents' in order where not given.

    Returns:
        Elements, (..., rows, agents), ``n`` where an agent is absent; a row's own agent always is.
    """
    near = (u / z)[..., None]  # a scale moves the threshold in place of all probabilities
    blocks, flat = partition.cut(x).flatten(0, -3), near.flatten(0, -3)
    parts = pieces(len(blocks), partition.n, cached(x.device))
    found = [torch.searchsorted(blocks[part].cumsum(-1), flat[part], right=True) for part in parts]
    place = (found[0] if len(found) == 1 else torch.cat(found)).view(u.shape)
    absent = (place == partition.widest).logical_or_(partition.mine if agents is None else partition.mine[agents])
    return partition.at(place).masked_fill_(absent, partition.n)
