"""Who talks to whom: graphs, weights of the averages over neighbours, and how fast these averages agree."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modicum.errors import RecipeError
from modicum.knobs import guarded
from modicum.random import generator
from modicum.submodular.geometry import array
from modicum.types import NonNegative, Positive, PositiveInt, UnitInterval

SUMS = 1e-8  # how far a row or column of weights may be from 1


@guarded
def ring(n: PositiveInt) -> Tensor:
    """Return the adjacency of a cycle of ``n`` agents.

    Example:
        >>> int(ring(5).sum())
        10
    """
    return _adjacency(n, ((i, (i + 1) % n) for i in range(n)))


@guarded
def path(n: PositiveInt) -> Tensor:
    """Return the adjacency of a line of ``n`` agents.

    Example:
        >>> int(path(5).sum())
        8
    """
    return _adjacency(n, ((i, i + 1) for i in range(n - 1)))


@guarded
def star(n: PositiveInt) -> Tensor:
    """Return the adjacency of ``n`` agents of whom the first knows all.

    Example:
        >>> star(4).sum(1).tolist()
        [3, 1, 1, 1]
    """
    return _adjacency(n, ((0, i) for i in range(1, n)))


@guarded
def complete(n: PositiveInt) -> Tensor:
    """Return the adjacency of ``n`` agents who all know each other.

    Example:
        >>> int(complete(4).sum())
        12
    """
    return _adjacency(n, ((i, j) for i in range(n) for j in range(i)))


@guarded
def grid(rows: PositiveInt, columns: PositiveInt | None = None) -> Tensor:
    """Return the adjacency of agents on a grid, a square one where only one side is given.

    Example:
        >>> int(grid(3, 3).sum())
        24
    """
    columns = rows if columns is None else columns
    right = ((r * columns + c, r * columns + c + 1) for r in range(rows) for c in range(columns - 1))
    down = ((r * columns + c, (r + 1) * columns + c) for r in range(rows - 1) for c in range(columns))
    return _adjacency(rows * columns, [*right, *down])


@guarded
def erdos_renyi(n: PositiveInt, *, degree: Positive = 4.0, seed: int = 0) -> Tensor:
    """Return a connected random graph; each pair is linked alike, so that agents know ``degree`` others on average.

    Args:
        n: Number of agents.
        degree: Expected number of neighbours.
        seed: Seed of the draws; a graph that is not connected is drawn again.

    Raises:
        RecipeError: A thousand draws gave no connected graph.

    Example:
        >>> graph = erdos_renyi(20, seed=1)
        >>> bool((graph == graph.T).all()), len(components(graph))
        (True, 1)
    """
    share = min(1.0, degree / max(1, n - 1))
    for draw in range(1000):
        linked = torch.rand(n, n, generator=generator(seed, "erdos_renyi", n, draw)) < share
        upper = torch.triu(linked, 1).long()
        if len(components(upper + upper.T)) == 1:
            return upper + upper.T
    raise RecipeError(f"No connected graph of {n} agents with {degree:g} neighbours came up. Raise degree.")


def metropolis_weights(adjacency: Any) -> Tensor:
    r"""Return the Metropolis weights of a graph.

    .. math::
        w_{ij} = \frac{1}{1 + \max(d_i, d_j)} \text{ for neighbours}, \qquad w_{ii} = 1 - \sum_{j \ne i} w_{ij}

    Args:
        adjacency: Symmetric matrix of 0 and 1; its diagonal does not matter.

    Returns:
        Symmetric and doubly stochastic, (N, N) in float64; all 1/N on a complete graph.

    Raises:
        RecipeError: The graph is not square, not symmetric, or not connected.

    Example:
        >>> metropolis_weights(path(3))[0].tolist()
        [0.6666666666666667, 0.3333333333333333, 0.0]

    Cost:
        N².

    Reference:
        Xiao, Boyd and Lall, "A Scheme for Robust Distributed Sensor Fusion Based on Average Consensus", IPSN 2005.
    """
    links = _graph(adjacency)
    degree = links.sum(1)
    weights = links / (1 + torch.maximum(degree[:, None], degree))
    return _with_diagonal(weights)


def lazy_weights(weights: Any) -> Tensor:
    r"""Return :math:`(I + W) / 2`, which halves the weight of all neighbours.

    Example:
        >>> lazy_weights([[0.5, 0.5], [0.5, 0.5]])[0].tolist()
        [0.75, 0.25]
    """
    W = torch.as_tensor(np.asarray(weights)).double()
    return (W + torch.eye(len(W), dtype=W.dtype)) / 2


def max_degree_weights(adjacency: Any) -> Tensor:
    r"""Return :math:`I - L / (1 + d_{\max})` with the graph's Laplacian ``L``: one weight for all links.

    Args:
        adjacency: Symmetric matrix of 0 and 1.

    Raises:
        RecipeError: The graph is not square, not symmetric, or not connected.

    Example:
        >>> max_degree_weights(path(3))[0].tolist()
        [0.6666666666666667, 0.3333333333333333, 0.0]
    """
    links = _graph(adjacency)
    return _with_diagonal(links / (1 + links.sum(1).max()))


def second_modulus(weights: Any) -> float:
    r"""Return :math:`\beta`, the factor by which one average shrinks disagreement: the second largest singular value.

    For symmetric weights it is the second largest modulus of an eigenvalue; :math:`1 - \beta` is the spectral gap.

    Example:
        >>> round(second_modulus(metropolis_weights(path(4))), 6)
        0.804738
    """
    W = torch.as_tensor(np.asarray(weights)).double()
    if len(W) == 1:
        return 0.0
    return float(torch.linalg.matrix_norm(W - 1 / len(W), 2)) if len(W) > 1 else 0.0


def consensus(weights: Tensor, x: Tensor) -> Tensor:
    r"""Return :math:`y_i = \sum_j w_{ij} x_j`.

    Args:
        weights: (N, N).
        x: A row for each agent, (..., N, n).

    Example:
        >>> consensus(torch.full((2, 2), 0.5), torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [2.0, 2.0]
    """
    return weights @ x


@guarded
def theory_step(
    T: PositiveInt, path: NonNegative = 1.0, beta: UnitInterval = 0.0, G: Positive = 1.0, N: PositiveInt = 1
) -> float:
    r"""Return the constant step of the theory, :math:`\frac{1}{G} \sqrt{(1 - \beta)(1 + C_T) / T}`.

    Args:
        T: Number of rounds.
        path: Path length of the optima :math:`C_T`; 1 where it is not known.
        beta: See :func:`second_modulus`.
        G: Bound on the length of an agent's gradient.
        N: Number of agents; kept for callers, the form does not use it.

    Raises:
        RecipeError: T or G is not positive, or beta outside [0, 1].

    Example:
        >>> theory_step(200, path=1.0)
        0.1

    Deviates:
        Published are the orders; the constant in front is ours. It is conservative: steps of a hundred times as much
        were best in tracking.

    Reference:
        Zhang et al., ICLR 2025, arXiv:2502.05028, from the bound of Theorem 3.
    """
    del N
    return math.sqrt((1 - beta) * (1 + path) / T) / G


def check_weights(weights: Any, *, adjacency: Any = None, agents: int | None = None, connected: bool = True) -> Tensor:
    """Return weights as a float64 matrix that one can average with; those of fewer digits are made to sum to 1.

    Args:
        weights: (N, N).
        adjacency: The graph whose links alone may carry weight.
        agents: How many agents there are.
        connected: Refuse weights under which agents never agree; off for one round of a graph that changes.

    Raises:
        RecipeError: It is not square, of another size, negative, not symmetric or not doubly stochastic, has weight off
            the graph, falls apart, or only swaps. The identity, that is no communication at all, is let through.

    Example:
        >>> check_weights([[0.5, 0.5], [0.5, 0.5]]).shape
        torch.Size([2, 2])
    """
    given = array(weights, "W").detach()
    W = given.double()
    if W.ndim != 2 or W.shape[0] != W.shape[1]:
        raise RecipeError(f"W has shape {tuple(W.shape)}, expected (N, N).")
    if agents is not None and len(W) != agents:
        raise RecipeError(f"W is for {len(W)} agents, but there are blocks of {agents}.")
    if not bool(W.isfinite().all()) or bool((W < 0).any()):
        i, j = (int(part) for part in (~(W >= 0) | W.isinf()).nonzero()[0])
        raise RecipeError(f"W[{i}, {j}] is {float(W[i, j]):g}, expected finite weights of at least 0.")
    short = given.is_floating_point() and given.dtype != torch.float64
    slack = max(SUMS, len(W) * torch.finfo(given.dtype).eps) if short else SUMS
    for name, sums in (("row", W.sum(1)), ("column", W.sum(0))):
        off = (sums - 1).abs() > slack
        if bool(off.any()):
            place = int(off.nonzero()[0])
            raise RecipeError(
                f"W is not doubly stochastic: {name} {place} sums to {float(sums[place]):.6g}, expected 1. "
                "metropolis_weights makes such weights of any connected graph."
            )
    if adjacency is not None:
        links = array(adjacency, "adjacency").to(W.device) != 0
        stray = (W > 0) & ~links & ~torch.eye(len(W), dtype=torch.bool, device=W.device)
        if bool(stray.any()):
            i, j = (int(part) for part in stray.nonzero()[0])
            raise RecipeError(f"W[{i}, {j}] is {float(W[i, j]):g}, but agents {i} and {j} are no neighbours.")
    if bool(((W - W.T).abs() > slack).any()):
        i, j = (int(part) for part in ((W - W.T).abs() > slack).nonzero()[0])
        raise RecipeError(
            f"W is not symmetric: W[{i}, {j}] is {float(W[i, j]):g}, but W[{j}, {i}] is {float(W[j, i]):g}. Agents "
            "answer whom they hear."
        )
    if short:
        W = (W + W.T) / 2
        W = W + torch.diag((1 - W.sum(1)).maximum(-W.diagonal()))
    if connected:
        _refuse_disagreement(W)
    return W


def _refuse_disagreement(W: Tensor) -> None:
    if torch.equal(W.cpu(), torch.eye(len(W), dtype=W.dtype)):
        return
    parts = components(W)
    if len(parts) > 1:
        raise RecipeError(_apart(parts))
    # Who keeps some of its own agrees in the end; without, agents may hand their copies to and fro for ever.
    if not bool((W.diagonal() > 0).any()) and second_modulus(W.cpu()) > 1 - SUMS:
        raise RecipeError(
            f"W has β = 1: agents 0 and {int(W[0].argmax())} swap their copies and never agree. lazy_weights(W) gives "
            "each a weight on itself."
        )


def components(graph: Any) -> list[list[int]]:
    """Return the agents of each connected part.

    Example:
        >>> components([[0, 1, 0], [1, 0, 0], [0, 0, 0]])
        [[0, 1], [2]]
    """
    links = np.asarray(graph.cpu() if isinstance(graph, Tensor) else graph) != 0
    links = links | links.T
    left, parts = set(range(len(links))), []
    while left:
        found, edge = set(), {min(left)}
        while edge:
            found |= edge
            edge = set(np.flatnonzero(links[sorted(edge)].any(0)).tolist()) - found
        parts.append(sorted(found))
        left -= found
    return parts


def _apart(parts: list[list[int]]) -> str:
    named = "; ".join(
        "{" + ", ".join(map(str, part[:8])) + (", …" if len(part) > 8 else "") + "}" for part in parts[:6]
    )
    return f"The graph is not connected: its parts are {named}. Link them."


def _graph(adjacency: Any) -> Tensor:
    found = array(adjacency, "adjacency")
    links = (found != 0).double()
    if links.ndim != 2 or links.shape[0] != links.shape[1]:
        raise RecipeError(f"adjacency has shape {tuple(links.shape)}, expected (N, N).")
    if not torch.equal(links, links.T):
        i, j = (int(part) for part in (links != links.T).nonzero()[0])
        raise RecipeError(f"adjacency is not symmetric at [{i}, {j}]. Links go both ways.")
    parts = components(links)
    if len(parts) > 1:
        raise RecipeError(_apart(parts))
    return links - torch.diag(links.diagonal())


def _with_diagonal(weights: Tensor) -> Tensor:
    return weights + torch.diag(1 - weights.sum(1))


def _adjacency(n: int, edges: Any) -> Tensor:
    if n < 1:
        raise RecipeError(f"a graph of {n} agents: expected at least 1.")
    links = torch.zeros(n, n, dtype=torch.long)
    for i, j in edges:
        if i != j:
            links[i, j] = links[j, i] = 1
    return links
