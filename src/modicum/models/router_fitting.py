"""The numerics of fitting a router: features in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modicum.random import derive_seed, generator

PLACES = ("centers", "precision")  # what distances need


def fit_linear(x: Tensor, y: Tensor, count: int, *, smoothing: float, decay: float, **_: Any) -> dict[str, Tensor]:
    """Return weight and bias of the least penalised cross-entropy."""
    weight = torch.zeros(count, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = nn.functional.cross_entropy(x @ weight.T + bias, y, label_smoothing=smoothing)
        value = value + decay / 2 * weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return {"weight": weight.detach(), "bias": bias.detach()}


def fit_mlp(
    x: Tensor, y: Tensor, count: int, *, smoothing: float, decay: float, epochs: int, seed: int
) -> dict[str, Tensor]:
    """Train, and fold the batch norms into the weights before them."""
    x, d = x.float(), x.shape[1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "router"))  # layers and dropout draw from the global generator
        hidden = [
            m for n in (d, 2 * d) for m in (nn.Linear(n, 2 * d), nn.BatchNorm1d(2 * d), nn.LeakyReLU(), nn.Dropout(0.5))
        ]
        net = nn.Sequential(*hidden, nn.Linear(2 * d, count))
        solver = torch.optim.AdamW(net.parameters(), lr=5e-4, weight_decay=decay)
        rng = generator(seed, "router", "order")
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x), generator=rng), 256):
                if len(rows) > 1:  # a batch norm needs two
                    solver.zero_grad()
                    loss: Any = nn.functional.cross_entropy(net(x[rows]), y[rows], label_smoothing=smoothing)
                    loss.backward()
                    solver.step()
    net.eval()
    found: dict[str, Tensor] = {}
    for i, place in enumerate((0, 4)):
        linear: Any = net[place]
        norm: Any = net[place + 1]
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        found[f"w{i}"] = (linear.weight * factor[:, None]).detach()
        found[f"b{i}"] = ((linear.bias - norm.running_mean) * factor + norm.bias).detach()
    last: Any = net[-1]
    return found | {"w2": last.weight.detach(), "b2": last.bias.detach()}


def rank_of(rank: int, width: int, tasks: int) -> int:
    """Return how many directions each task gets: no more than leave room for those of the others.

    Example:
        >>> rank_of(8, 576, 4), rank_of(8, 8, 3)
        (8, 2)
    """
    return min(rank, max(1, width // tasks))


def directions(x: Tensor, rank: int) -> Tensor:
    """Return the leading right singular vectors ``(rank, d)``; zeros where there are fewer."""
    found = torch.linalg.svd(x, full_matrices=False).Vh[:rank]
    return torch.cat([found, found.new_zeros(rank - len(found), x.shape[1])])


def residuals(x: Tensor, bases: Sequence[Tensor]) -> Tensor:
    """Return how much of each row every task's directions leave: lengths ``(n, T)``.

    Example:
        >>> residuals(torch.tensor([[3.0, 4]]), [torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 1]])]).tolist()
        [[4.0, 3.0]]
    """
    return torch.stack([(x - x @ basis.T @ basis).norm(dim=1) for basis in bases], 1)


def centers(x: Tensor, y: Tensor, count: int) -> dict[str, Tensor]:
    """Return the tasks' means and the inverse of the covariance around them, a little of the identity mixed in.

    They are in float32, as they are stored: the distances before and after are the same.
    """
    centers = torch.stack([x[y == t].mean(0) for t in range(count)])
    around = x - centers[y]
    covariance = around.T @ around / len(x)
    level = covariance.diagonal().mean().clamp_min(1e-12)
    mixed = 0.9 * covariance + 0.1 * level * torch.eye(x.shape[1], dtype=x.dtype)
    inverse = torch.linalg.inv(mixed)
    return {"centers": centers.float(), "precision": ((inverse + inverse.T) / 2).float()}


def packed(tensors: Mapping[str, Tensor], *, gate: bool) -> dict[str, Tensor]:
    """Return a router's numbers as they are stored: of the precision, which is symmetric, the lower triangle.

    Args:
        tensors: Of the router.
        gate: Whether distances are asked for; else what they need is left out.
    """
    found = {name: tensor.contiguous() for name, tensor in tensors.items() if gate or name not in PLACES}
    if "precision" in found:
        rows, columns = torch.tril_indices(*found["precision"].shape)
        found["precision"] = found["precision"][rows, columns]
    return found


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a router's numbers from what :func:`packed` made of them."""
    found = dict(tensors)
    if "precision" in found:
        size = found["centers"].shape[1]
        rows, columns = torch.tril_indices(size, size)
        whole = found["precision"].new_empty(size, size)
        whole[rows, columns] = whole[columns, rows] = found["precision"]
        found["precision"] = whole
    return found


def stored_bytes(kind: str, *, experts: int, width: int, rank: int, gate: bool) -> int:
    """Return the bytes of a router's numbers as they are stored, before it is fitted.

    Example:
        >>> stored_bytes("linear", experts=4, width=576, rank=8, gate=False)
        27680
    """
    n, d = experts, width
    if kind == "entropy":
        return 0
    known = 4 * (n * d + d * (d + 1) // 2) if gate else 0
    if kind == "subspace":
        return known + 8 * n * rank_of(rank, d, n) * d
    if kind == "linear":
        return known + 8 * (2 * d + n * d + n)
    return known + 8 * 2 * d + 4 * (2 * d * d + 4 * d * d + 4 * d + n * 2 * d + n)


def mahalanobis(features: Tensor, centers: Tensor, precision: Tensor) -> Tensor:
    """Return each row's distance to the nearest center, in deviations.

    Example:
        >>> mahalanobis(torch.tensor([[3.0, 0]]), torch.zeros(1, 2), torch.eye(2)).tolist()
        [3.0]
    """
    apart = features.double()[:, None] - centers.double()
    return torch.einsum("ntd,de,nte->nt", apart, precision.double(), apart).clamp_min(0).sqrt().amin(1)
