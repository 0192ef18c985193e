r"""Expected gains where every agent draws one action: exact, for facility location and for coverage.

Row ``j`` is served at least as well as ``t`` unless every other agent misses: agent ``l`` misses with probability
:math:`1 - z \sum_{b \in V_l, V_{jb} > t} \pi_{lb}`. Integrated over ``t`` from 0 to :math:`V_{ja}`, the product of
these gives what action ``a`` adds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modicum.submodular.functions.base import pieces
from modicum.submodular.partition import Partition


def facility_gains(V: Tensor, weights: Tensor, x: Tensor, partition: Partition, z: Tensor) -> Tensor:
    r"""Return :math:`\mathbb E[f(S \cup a) - f(S)]` for each agent's own actions, for facility location.

    Args:
        V: Values, (m, n) or (worlds, m, n).
        weights: Of rows, (m,) or (worlds, m).
        x: A row of probabilities for each agent, (..., agents, n), with worlds before.
        partition: Whose the elements are.
        z: Probabilities of another agent's presence, one for each node.

    Returns:
        Shape (nodes, ..., agents, widest block).
    """
    if V.ndim == 3:
        found = [
            facility_gains(V[i], weights if weights.ndim == 1 else weights[i], x[i], partition, z)
            for i in range(len(V))
        ]
        return torch.stack(found, 1)
    agents, widest = partition.agents, partition.widest
    lead = x.shape[:-2]
    rows = partition.cut(x.reshape(-1, agents, partition.n))  # (copies, agent i, agent l, K)
    inside, local = partition.cut(V).sort(dim=-1, descending=True, stable=True)  # (m, l, K)
    values, rank = inside.flatten(-2).sort(dim=-1, descending=True, stable=True)  # (m, n)
    widths = values - torch.nn.functional.pad(values[:, 1:], (0, 1))
    own = torch.arange(agents, device=x.device)
    out = x.new_zeros(len(z), len(rows), agents, agents, widest)
    for node, present in enumerate(z):
        for copy, row in enumerate(rows):
            for part in pieces(len(V), agents * values.shape[1] * 4):
                some = local[part]
                picked = row[:, None].expand(-1, len(some), -1, -1).gather(-1, some.expand(agents, *some.shape))
                missed = torch.log1p(-(present * picked.cumsum(-1)).clamp_(max=1 - 1e-15))
                change = missed.diff(dim=-1, prepend=torch.zeros_like(missed[..., :1]))
                change[own, :, own] = 0
                order = rank[part].expand(agents, -1, -1)
                none = change.flatten(-2).gather(-1, order).cumsum(-1).exp_()
                tail = (none * widths[part]).flip(-1).cumsum(-1).flip(-1)
                gains = torch.zeros_like(tail).scatter_(-1, order, tail).reshape(agents, len(some), agents, widest)
                back = torch.zeros_like(gains).scatter_(-1, some.expand_as(gains), gains)
                out[node, copy] += torch.einsum("imlk,m->ilk", back, weights[part])
    return out[:, :, own, own].reshape(len(z), *lead, agents, widest) * partition.valid


def coverage_gains(P: Tensor, weights: Tensor, x: Tensor, partition: Partition, z: Tensor) -> Tensor:
    r"""Return :math:`\mathbb E[f(S \cup a) - f(S)]` for each agent's own actions, for coverage.

    With :math:`p_{ja}` the probability of covering row ``j`` it is :math:`\sum_j w_j p_{ja} \prod_{l \ne i} (1 - z
    \sum_{b \in V_l} \pi_{lb} p_{jb})`. Arguments and result are those of :func:`facility_gains`.
    """
    if P.ndim == 3:
        parts = [
            coverage_gains(P[i], weights if weights.ndim == 1 else weights[i], x[i], partition, z)
            for i in range(len(P))
        ]
        return torch.stack(parts, 1)
    agents = partition.agents
    rows = partition.cut(x.reshape(-1, agents, partition.n))
    hit = torch.einsum("cilk,jlk->cijl", rows, partition.cut(P))
    missed = 1 - z.view(-1, 1, 1, 1, 1) * hit
    own = torch.arange(agents, device=x.device)
    missed[:, :, own, :, own] = 1
    rest = missed.prod(-1) * weights
    found = torch.einsum("zcij,jik->zcik", rest, partition.cut(P))
    return found.reshape(len(z), *x.shape[:-1], partition.widest)
